// SPDX-License-Identifier: Apache-2.0
// Requests on files: many through one io_uring, or through a pool of threads where there is none.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "file.hpp"
#include "plan.hpp"
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

// The requests that carry out a plan in this memory. Only the last may run on: behind any other lie wanted bytes.
std::vector<Request> requests_for(std::span<const Read> plan, std::span<std::byte> memory);

// `before` is called before a request is issued, on threads from several of them at once. It may choose the address,
// and may block only if `may_wait`: else it returns false, and is asked again when another request is complete. `after`
// is called when a request is complete, one at a time. What they throw ends the transfer. On threads, `dropped` is
// called for a request that will not complete, so that others need not wait for what it holds.
struct Hooks {
    std::function<bool(Request&, bool may_wait)> before = [](Request&, bool) { return true; };
    std::function<void(const Request&)> after = [](const Request&) {};
    std::function<void(const Request&)> dropped = [](const Request&) {};
};

// Carries out all requests, at most `options.depth` at a time, retrying what is short. Notes in `transfer.result` how
// it was done. Where the limits allow, `memory` is registered with the ring (io_uring_register(2)).
void execute(Transfer& transfer, Direction direction, std::span<File> files, std::span<const Request> requests,
             const Options& options, std::span<std::byte> memory, const Hooks& hooks);

// Where the page cache (or tmpfs) has all that will be read, plain reads by many threads are faster than any disk:
// makes files and options so. False if it has not, or nobody asked for that.
bool take_from_page_cache(std::span<File> files, std::span<const Read> reads, Options& options);

// One request, with plain preads or pwrites.
void execute_one(Direction direction, File& file, const Request& request);

}  // namespace flashd
