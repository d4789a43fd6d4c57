// SPDX-License-Identifier: Apache-2.0
// Requests on files: many through one io_uring, or through a pool of threads where there is none.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "file.hpp"
#include "transfer.hpp"

namespace flashd {

enum class Direction { read, write };

// `length` bytes must move. A read may run on to `capacity` so that its end is aligned for O_DIRECT; what lies beyond
// `length` is then undefined.
struct Request {
    uint32_t file;
    uint64_t offset;
    std::byte* address;
    uint64_t length;
    uint64_t capacity;
};

struct Hooks {
    std::function<void(const Request&)> before = [](const Request&) {};
    std::function<void(const Request&)> after = [](const Request&) {};
};

// Carries out all requests, at most `options.depth` at a time, retrying what is short. Notes in `transfer.result` how
// it was done. `before` is called before a request is issued, `after` when it is complete, both one at a time.
void execute(Transfer& transfer, Direction direction, std::span<File> files, std::span<const Request> requests,
             const Options& options, std::span<std::byte> memory, const Hooks& hooks);

// One request, with plain preads or pwrites.
void execute_one(Direction direction, File& file, const Request& request);

}  // namespace flashd
