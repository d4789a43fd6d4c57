// SPDX-License-Identifier: Apache-2.0
// Requests on files, through an io_uring, or through a pool of threads if there is none.
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

// `length` bytes must be moved. A read may extend to `capacity` to end aligned for O_DIRECT; bytes beyond `length` are
// then undefined.
struct Request {
    uint32_t file;
    uint64_t offset;
    std::byte* address;
    uint64_t length;
    uint64_t capacity;
};

// Returns the requests for a plan in this memory. Only the last may extend beyond its length, because wanted bytes
// follow all others.
std::vector<Request> requests_for(std::span<const Read> plan, std::span<std::byte> memory);

// `before` is called before a request is issued, on threads from several of them at once. It may choose the address,
// and may block only if `may_wait`: else it returns false, and is called again when another request is complete.
// `after` is called for complete requests, one at a time. An exception of either ends the transfer. On threads,
// `dropped` is called for a request that will not complete, so that others do not wait for what it holds.
struct Hooks {
    std::function<bool(Request&, bool may_wait)> before = [](Request&, bool) { return true; };
    std::function<void(const Request&)> after = [](const Request&) {};
    std::function<void(const Request&)> dropped = [](const Request&) {};
};

// Performs all requests, at most `options.depth` at a time, and retries short ones. Notes in `transfer.result` how that
// was done. Where the limits allow, `memory` is registered with the ring (io_uring_register(2)).
void execute(Transfer& transfer, Direction direction, std::span<File> files, std::span<const Request> requests,
             const Options& options, std::span<std::byte> memory, const Hooks& hooks);

// If everything to be read is in the page cache (or on tmpfs), plain reads by many threads are faster than any disk:
// changes files and options accordingly. Returns false if it is not, or if the options do not ask for this.
bool take_from_page_cache(std::span<File> files, std::span<const Read> reads, Options& options);

// One request, with plain preads or pwrites.
void execute_one(Direction direction, File& file, const Request& request);

}  // namespace flashd
