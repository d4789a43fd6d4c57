// SPDX-License-Identifier: Apache-2.0
#include "load.hpp"

#include <algorithm>
#include <deque>
#include <functional>
#include <optional>

#include "cpu_clock.hpp"
#include "error.hpp"
#include "io.hpp"
#include "memory.hpp"

namespace flashd {

namespace {

// Threads that compare blocks with their digests while later blocks are being read.
class DigestWorkers {
  public:
    using Check = std::function<void(const Request&)>;

    DigestWorkers(unsigned threads, Check check) : check_(std::move(check)) {
        for (unsigned i = 0; i < threads; ++i) threads_.emplace_back([this] { run(); });
    }
    ~DigestWorkers() { end(); }

    void add(const Request& request) {
        {
            const std::lock_guard lock(mutex_);
            if (error_) std::rethrow_exception(error_);
            queue_.push_back(request);
        }
        changed_.notify_one();
    }

    // Waits for all that was added; throws the first mismatch. Returns the CPU seconds used.
    double finish() {
        end();
        if (error_) std::rethrow_exception(error_);
        return cpu_seconds_;
    }

  private:
    void end() {
        {
            const std::lock_guard lock(mutex_);
            ended_ = true;
        }
        changed_.notify_all();
        threads_.clear();
    }

    void run() {
        std::unique_lock lock(mutex_);
        for (;;) {
            changed_.wait(lock, [this] { return ended_ || !queue_.empty(); });
            if (queue_.empty()) break;
            const Request request = queue_.front();
            queue_.pop_front();
            lock.unlock();
            std::exception_ptr error;
            try {
                check_(request);
            } catch (...) {
                error = std::current_exception();
            }
            lock.lock();
            if (error && !error_) error_ = error;
        }
        cpu_seconds_ += thread_cpu_seconds();
    }

    Check check_;
    std::mutex mutex_;
    std::condition_variable changed_;
    std::deque<Request> queue_;
    std::exception_ptr error_;
    bool ended_ = false;
    double cpu_seconds_ = 0;
    std::vector<std::jthread> threads_;
};

uint64_t total_of(std::span<const Read> reads) {
    uint64_t total = 0;
    for (const Read& read : reads) total += read.length;
    return total;
}

void compare(const DigestTable& digests, uint64_t region_offset, std::span<const std::byte> block, const File& file,
             uint64_t file_offset) {
    if (!digests.matches(region_offset / digests.block(), digest(block)))
        throw Error(Failure::corrupt, "digest", 0, file.path(), file_offset);
}

}  // namespace

std::unique_ptr<Transfer> load(std::vector<File> files, std::span<const Read> reads, std::span<std::byte> memory,
                               DigestTable digests, bool populate, const Options& options) {
    const uint64_t block = digests.empty() ? options.block : digests.block();
    uint64_t end = 0;
    for (const Read& read : reads) end = std::max(end, read.memory_offset + read.length);
    std::vector<Request> requests;
    for (const Read& read : split(reads, block)) {
        // Only the last block may run on past its length, up to an aligned end: behind any other lie wanted bytes.
        const bool last = read.memory_offset + read.length == end;
        const uint64_t capacity =
            last ? std::min(memory.size() - read.memory_offset, align_up(read.length)) : read.length;
        requests.push_back({read.file, read.file_offset, memory.data() + read.memory_offset, read.length, capacity});
    }
    auto body = [files = std::move(files), requests = std::move(requests), memory, digests = std::move(digests),
                 populate, options, block](Transfer& transfer) mutable {
        std::optional<Populator> populator;
        if (populate) populator.emplace(memory, std::max(options.populate_threads, 1U), transfer.cancelled());
        std::optional<DigestWorkers> workers;
        if (!digests.empty())
            workers.emplace(std::max(options.digest_threads, 1U), [&](const Request& request) {
                compare(digests, static_cast<uint64_t>(request.address - memory.data()),
                        {request.address, request.length}, files[request.file], request.offset);
            });
        Hooks hooks;
        if (populator)
            hooks.before = [&](const Request& request) {
                populator->wait_until(static_cast<uint64_t>(request.address - memory.data()) + request.length);
            };
        if (workers) hooks.after = [&](const Request& request) { workers->add(request); };
        Options actual = options;
        actual.block = block;
        // Registering memory makes all of it present first, so it only pays where it already is.
        execute(transfer, Direction::read, files, requests, actual, populate ? std::span<std::byte>{} : memory, hooks);
        if (workers) transfer.result.digest_cpu_seconds = workers->finish();
        if (populator) {
            populator->join();
            transfer.result.populate_cpu_seconds = populator->cpu_seconds();
        }
    };
    // A std::function must be copyable, and files are not.
    auto shared = std::make_shared<decltype(body)>(std::move(body));
    return std::make_unique<Transfer>(total_of(reads), [shared](Transfer& transfer) { (*shared)(transfer); });
}

std::unique_ptr<Transfer> verify(File file, uint64_t start, uint64_t length, DigestTable digests,
                                 const Options& options) {
    auto shared = std::make_shared<File>(std::move(file));
    return std::make_unique<Transfer>(length, [=, digests = std::move(digests)](Transfer& transfer) {
        const uint64_t block = digests.block();
        const size_t blocks = (length + block - 1) / block;
        if (blocks != digests.size()) throw Error(Failure::corrupt, "digest count", 0, shared->path());
        parallel_for(transfer, blocks, options.depth, transfer.result.cpu_seconds, [&] {
            auto buffer = std::make_shared<Buffer>(align_up(block));
            return [&, buffer](size_t index) {
                const uint64_t offset = index * block;
                const uint64_t size = std::min(block, length - offset);
                const Request request{0, start + offset, buffer->data(), size,
                                      std::min(align_up(size), buffer->size())};
                execute_one(Direction::read, *shared, request);
                compare(digests, offset, {buffer->data(), size}, *shared, start + offset);
                transfer.advance(size);
            };
        });
        transfer.result.direct = shared->has_direct();
        transfer.result.block = block;
        transfer.result.depth = options.depth;
        if (options.direct) transfer.fell_back(shared->direct_refused());
    });
}

}  // namespace flashd
