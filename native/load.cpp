// SPDX-License-Identifier: Apache-2.0
#include "load.hpp"

#include <algorithm>
#include <numeric>
#include <optional>
#include <thread>
#include <utility>

#include "digest_workers.hpp"
#include "io.hpp"
#include "memory.hpp"

namespace flashd {

namespace {

struct Load {
    std::vector<File> files;
    std::vector<Read> reads;
    std::span<std::byte> memory;
    DigestTable digests;
    bool populate;
    Options options;

    uint64_t total() const {
        const auto add = [](uint64_t sum, const Read& read) { return sum + read.length; };
        return std::accumulate(reads.begin(), reads.end(), uint64_t{0}, add);
    }

    uint64_t memory_offset(const Request& request) const {
        return static_cast<uint64_t>(request.address - memory.data());
    }

    void run(Transfer& transfer) {
        Hooks hooks;
        std::optional<Populator> populator;
        if (populate) {
            const unsigned automatic = std::clamp(std::thread::hardware_concurrency(), 1U, 4U);
            const unsigned threads = options.populate_threads == 0 ? automatic : options.populate_threads;
            populator.emplace(memory, threads, transfer.cancelled());
            hooks.before = [&](const Request& request, bool) {
                populator->wait_until(memory_offset(request) + request.length);
                return true;
            };
        }
        std::optional<DigestWorkers> workers;
        if (!digests.empty()) {
            workers.emplace(memory, digests, reads, files, options.digest_threads);
            hooks.after = [&](const Request& request) { workers->arrived(memory_offset(request), request.length); };
        }
        take_from_page_cache(files, reads, options);
        const auto requests = requests_for(split(reads, options.block), memory);
        execute(transfer, Direction::read, files, requests, options, memory, hooks);
        if (workers) transfer.result.digest_cpu_seconds = workers->finish();
        if (populator) transfer.result.populate_cpu_seconds = populator->finish();
    }
};

}  // namespace

std::unique_ptr<Transfer> load(std::vector<File> files, std::vector<Read> reads, std::span<std::byte> memory,
                               DigestTable digests, bool populate, const Options& options) {
    // A std::function must be copyable, and files are not.
    const auto load =
        std::make_shared<Load>(Load{std::move(files), std::move(reads), memory, std::move(digests), populate, options});
    return std::make_unique<Transfer>(load->total(), [load](Transfer& transfer) { load->run(transfer); });
}

std::unique_ptr<Transfer> verify(File file, uint64_t start, uint64_t length, DigestTable digests,
                                 const Options& options) {
    auto shared = std::make_shared<File>(std::move(file));
    return std::make_unique<Transfer>(length, [=, digests = std::move(digests)](Transfer& transfer) {
        const uint64_t block = digests.block();
        const size_t blocks = (length + block - 1) / block;
        parallel_for(transfer, blocks, options.depth, transfer.result.cpu_seconds, [&](const Next& next) {
            const Buffer buffer(align_up(block));
            while (const auto index = next()) {
                const uint64_t offset = *index * block;
                const uint64_t size = std::min(block, length - offset);
                execute_one(Direction::read, *shared, {0, start + offset, buffer.data(), size, align_up(size)});
                digests.check(*index, {buffer.data(), size}, shared->path(), start + offset);
                transfer.advance(size);
            }
        });
        transfer.result.direct = shared->has_direct();
        transfer.result.block = block;
        transfer.result.depth = options.depth;
        transfer.fell_back(shared->direct_refused());
    });
}

}  // namespace flashd
