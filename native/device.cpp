// SPDX-License-Identifier: Apache-2.0
#include "device.hpp"

#include <algorithm>
#include <array>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "error.hpp"
#include "io.hpp"
#include "plan.hpp"
#include "work_queue.hpp"

namespace flashd {

namespace {

constexpr unsigned non_blocking = 1;  // CU_STREAM_NON_BLOCKING: no implicit order with anybody's default stream
// Large enough to reach the link's bandwidth, small enough for quick cancellation and fair turns of two transfers.
constexpr uint64_t large_copy = 64 << 20;
constexpr size_t large_copies = 4;

Driver::Address address_of(const void* memory) { return reinterpret_cast<Driver::Address>(memory); }

// A queue of copies on a device. Its destructor always waits until the device no longer uses the memory.
class Stream {
  public:
    explicit Stream(const Device& device) : device_(device) {
        device_.enter();
        device_.check(device_.driver->create_stream(&stream_, non_blocking), "create stream");
    }
    ~Stream() {
        device_.driver->set_context(device_.context);
        device_.driver->synchronize_stream(stream_);
        device_.driver->destroy_stream(stream_);
    }
    Stream(const Stream&) = delete;
    Stream& operator=(const Stream&) = delete;

    const Device& device() const { return device_; }

    // Starts a copy, and records the event behind it. If it throws, the device no longer uses the memory.
    void copy(Driver::Address to, Driver::Address from, uint64_t length, Driver::Event event) {
        device_.check(device_.driver->copy_async(to, from, length, stream_), "copy");
        const Driver::Status status = device_.driver->record_event(event, stream_);
        if (status != 0) device_.driver->synchronize_stream(stream_);
        device_.check(status, "record event");
    }
    void wait(Driver::Event event) const { device_.check(device_.driver->synchronize_event(event), "wait for a copy"); }
    void synchronize() { device_.check(device_.driver->synchronize_stream(stream_), "wait for copies"); }

  private:
    Device device_;
    Driver::Stream stream_ = nullptr;
};

class Event {
  public:
    explicit Event(const Device& device) : device_(device) {
        device_.check(device_.driver->create_event(&event_, no_timing), "create event");
    }
    ~Event() { device_.driver->destroy_event(event_); }
    Event(const Event&) = delete;
    Event& operator=(const Event&) = delete;

    Driver::Event get() const { return event_; }

  private:
    Device device_;
    Driver::Event event_ = nullptr;
};

// One thread's copies, on their own stream, which use a few places in turn. Finished copies count as the transfer's
// progress.
class Rotation {
  public:
    Rotation(Transfer& transfer, const Device& device, size_t places) : transfer_(transfer), lengths_(places) {
        device.enter();
        for (size_t i = 0; i < places; ++i) events_.emplace_back(device);
        stream_.emplace(device);
    }

    // Returns the next place, once the device no longer uses it.
    size_t place() {
        if (under_way_ == lengths_.size()) await_oldest();
        return next_;
    }

    // Starts a copy in the next place.
    void copy(Driver::Address to, Driver::Address from, uint64_t length) {
        stream_->copy(to, from, length, events_[next_].get());
        lengths_[next_] = length;
        next_ = (next_ + 1) % lengths_.size();
        ++under_way_;
    }

    void finish() {
        while (under_way_ > 0) await_oldest();
    }

  private:
    void await_oldest() {
        const size_t oldest = (next_ + lengths_.size() - under_way_) % lengths_.size();
        stream_->wait(events_[oldest].get());
        transfer_.advance(lengths_[oldest]);
        --under_way_;
    }

    Transfer& transfer_;
    std::vector<uint64_t> lengths_;
    size_t next_ = 0;
    size_t under_way_ = 0;
    std::deque<Event> events_;
    std::optional<Stream> stream_;  // ends, and is waited for, before the events do
};

// A block in flight, and its destination.
struct Parcel {
    Staging::Block* block;
    uint64_t offset;
    uint64_t length;
};

// Sends filled blocks to the device. A copy starts at once; the block is given back when the copy is done.
class Sender {
  public:
    // `inspect` looks at a block's bytes while they are copied, on one of `threads` threads.
    Sender(StagingShare& share, Driver::Address target, unsigned threads, std::function<void(const Parcel&)> inspect)
        : share_(share),
          target_(target),
          inspect_(std::move(inspect)),
          stream_(share.staging().device()),
          finishers_(threads, [this](const Parcel& parcel) { finish_one(parcel); }) {}

    // Any thread may call this. The sender owns the block from then on.
    void send(Staging::Block* block, uint64_t offset, uint64_t length) {
        stream_.device().enter();
        const std::lock_guard lock(mutex_);
        finishers_.check();
        stream_.copy(target_ + offset, address_of(block->memory), length, block->event);
        finishers_.add({block, offset, length});
    }

    double finish() {
        const double cpu_seconds = finishers_.finish();
        stream_.synchronize();
        return cpu_seconds;
    }

  private:
    void finish_one(const Parcel& parcel) {
        // The copy is awaited even if the bytes turn out wrong, because the block then gets another owner.
        std::exception_ptr error;
        try {
            inspect_(parcel);
        } catch (...) {
            error = std::current_exception();
        }
        stream_.device().enter();
        stream_.wait(parcel.block->event);
        share_.give_back(parcel.block);
        if (error) std::rethrow_exception(error);
    }

    StagingShare& share_;
    Driver::Address target_;
    std::function<void(const Parcel&)> inspect_;
    std::mutex mutex_;
    // Order of destruction: the finishers, the stream, then the share that owns the blocks.
    Stream stream_;
    WorkQueue<Parcel> finishers_;
};

unsigned copy_threads(const Options& options) {
    const unsigned automatic = std::clamp(std::thread::hardware_concurrency(), 1U, 16U);
    return options.copy_threads == 0 ? automatic : options.copy_threads;
}

void note(Transfer& transfer, const Staging& staging) { transfer.result.staging = staging.peak(); }

}  // namespace

namespace {

// Fills a place in the staging memory with the part of a block that begins at `offset`.
using Fill = std::function<void(uint64_t offset, std::span<std::byte> piece)>;

// One thread's path to the device, through a block of staging memory.
//
// Memory bandwidth is the limit here, and data in the processor's cache uses none of it. So a thread refills the same
// few small places, and the device fetches each from the cache.
class Lane {
  public:
    Lane(Transfer& transfer, StagingShare& share, const Options& options)
        : transfer_(transfer),
          share_(share),
          piece_(std::clamp<uint64_t>(align_down(options.piece), alignment, share.staging().block())),
          loan_(share, transfer.cancelled()),
          rotation_(transfer, share.staging().device(),
                    std::clamp<size_t>(options.pieces, 1, share.staging().block() / piece_)) {}

    // Returns while the last pieces are still in flight.
    void send(Driver::Address target, uint64_t length, const Fill& fill) {
        for (uint64_t done = 0; done < length; done += piece_) {
            transfer_.stop_if_cancelled();
            const uint64_t part = std::min(piece_, length - done);
            std::byte* memory = loan_->memory + rotation_.place() * piece_;
            fill(done, {memory, part});
            rotation_.copy(target + done, address_of(memory), part);
        }
    }

    // Gives other transfers their share of the blocks.
    void take_turns() {
        if (!share_.is_wanted()) return;
        rotation_.finish();
        loan_.exchange(transfer_.cancelled());
    }

    void finish() { rotation_.finish(); }

  private:
    Transfer& transfer_;
    StagingShare& share_;
    uint64_t piece_;
    Loan loan_;  // ends when nothing of it is on its way: others may wait for it, also where we failed
    Rotation rotation_;
};

// Copies with several threads, block by block.
void send_blocks(Transfer& transfer, const std::shared_ptr<Staging>& staging, uint64_t length, unsigned threads,
                 const Options& options, const std::function<void(Lane&, size_t index, uint64_t length)>& send) {
    const uint64_t block = staging->block();
    StagingShare share(staging);
    parallel_for(transfer, (length + block - 1) / block, threads, transfer.result.cpu_seconds, [&](const Next& next) {
        Lane lane(transfer, share, options);
        while (const auto index = next()) {
            lane.take_turns();
            send(lane, *index, std::min(block, length - *index * block));
        }
        lane.finish();
    });
    note(transfer, *staging);
}

void load_from_page_cache(Transfer& transfer, File& file, uint64_t start, uint64_t length, Driver::Address target,
                          const DigestTable& digests, const std::shared_ptr<Staging>& staging, const Options& options) {
    const uint64_t block = staging->block();
    const unsigned threads = copy_threads(options);
    send_blocks(transfer, staging, length, threads, options, [&](Lane& lane, size_t index, uint64_t whole) {
        const uint64_t offset = index * block;
        Hasher hasher;
        lane.send(target + offset, whole, [&](uint64_t done, std::span<std::byte> piece) {
            execute_one(Direction::read, file, {0, start + offset + done, piece.data(), piece.size(), piece.size()});
            if (!digests.empty()) hasher.update(piece);
        });
        if (!digests.empty()) digests.check(index, hasher.finish(), file.path(), start + offset);
    });
    transfer.result.backend = Backend::threads;
    transfer.result.block = block;
    transfer.result.depth = threads;
    transfer.fell_back(file.direct_refused());
}

}  // namespace

std::unique_ptr<Transfer> load_device(File file, uint64_t start, uint64_t length, Driver::Address target,
                                      DigestTable digests, std::shared_ptr<Staging> staging, const Options& options) {
    auto shared = std::make_shared<File>(std::move(file));
    return std::make_unique<Transfer>(length, [=, digests = std::move(digests)](Transfer& transfer) {
        const uint64_t block = staging->block();
        Options chosen = options;
        chosen.block = block;
        if (take_from_page_cache({shared.get(), 1}, std::array{Read{0, start, 0, length}}, chosen)) {
            load_from_page_cache(transfer, *shared, start, length, target, digests, staging, chosen);
            return;
        }
        // Reads never wait for copies: a quarter of the blocks is reserved for copies in flight.
        const auto blocks = static_cast<unsigned>(staging->memory().size() / block);
        chosen.depth = std::clamp(blocks * 3 / 4, 1U, chosen.depth);
        StagingShare share(staging);
        const auto inspect = [&](const Parcel& parcel) {
            if (digests.empty() || transfer.cancelled()) return;
            digests.check(parcel.offset / block, {parcel.block->memory, parcel.length}, shared->path(),
                          start + parcel.offset);
        };
        Sender sender(share, target, digests.empty() ? 1 : chosen.digest_threads, inspect);
        std::vector<Request> requests;
        for (uint64_t offset = 0; offset < length; offset += block) {
            const uint64_t part = std::min(block, length - offset);
            requests.push_back({0, start + offset, nullptr, part, align_up(part)});
        }
        Hooks hooks;
        hooks.before = [&](Request& request, bool may_wait) {
            Staging::Block* found = share.take(may_wait, transfer.cancelled());
            if (found != nullptr) request.address = found->memory;
            return found != nullptr;
        };
        hooks.after = [&](const Request& request) {
            sender.send(share.block_at(request.address), request.offset - start, request.length);
        };
        hooks.dropped = [&](const Request& request) { share.give_back(share.block_at(request.address)); };
        execute(transfer, Direction::read, {shared.get(), 1}, requests, chosen, staging->memory(), hooks);
        const double cpu_seconds = sender.finish();
        (digests.empty() ? transfer.result.cpu_seconds : transfer.result.digest_cpu_seconds) += cpu_seconds;
        note(transfer, *staging);
    });
}

std::unique_ptr<Transfer> write_device(File target, uint64_t offset, Driver::Address source, uint64_t length,
                                       std::shared_ptr<Staging> staging, const Options& options) {
    auto shared = std::make_shared<File>(std::move(target));
    return std::make_unique<Transfer>(length, [=](Transfer& transfer) {
        shared->preallocate(align_up(offset + length));
        const uint64_t block = staging->block();
        Options chosen = options;
        chosen.block = block;
        StagingShare share(staging);
        Stream stream(staging->device());
        std::mutex mutex;
        std::string digests((length + block - 1) / block * digest_bytes, '\0');
        std::vector<Request> requests;
        for (uint64_t done = 0; done < length; done += block) {
            // The last write is padded for O_DIRECT; the truncate below removes the padding.
            const uint64_t part = align_up(std::min(block, length - done));
            requests.push_back({0, offset + done, nullptr, part, part});
        }
        Hooks hooks;
        // A copy from the device takes a hundredth of the write that follows, so it is simply awaited.
        hooks.before = [&](Request& request, bool may_wait) {
            Loan loan(share, share.take(may_wait, transfer.cancelled()));
            if (loan.get() == nullptr) return false;
            const uint64_t start = request.offset - offset;
            const uint64_t wanted = std::min(request.length, length - start);
            std::memset(loan->memory + wanted, 0, request.length - wanted);
            stream.device().enter();
            {
                const std::lock_guard lock(mutex);
                stream.copy(address_of(loan->memory), source + start, wanted, loan->event);
            }
            stream.wait(loan->event);
            const Digest found = digest({loan->memory, wanted});
            std::memcpy(digests.data() + start / block * digest_bytes, found.data(), digest_bytes);
            request.address = loan->memory;
            loan.handed_on();
            return true;
        };
        hooks.after = [&](const Request& request) { share.give_back(share.block_at(request.address)); };
        hooks.dropped = hooks.after;
        execute(transfer, Direction::write, {shared.get(), 1}, requests, chosen, staging->memory(), hooks);
        shared->truncate(offset + length);
        shared->sync();
        transfer.result.digests = std::move(digests);
        note(transfer, *staging);
    });
}

namespace {

enum class Way { to_device, from_device };

// Keeps a few large copies in flight, without using the processor.
void move_registered(Transfer& transfer, const Device& device, Driver::Address to, Driver::Address from,
                     uint64_t length) {
    Rotation rotation(transfer, device, large_copies);
    for (uint64_t done = 0; done < length; done += large_copy) {
        rotation.place();
        transfer.stop_if_cancelled();
        rotation.copy(to + done, from + done, std::min(large_copy, length - done));
    }
    rotation.finish();
}

void upload_staged(Transfer& transfer, std::span<std::byte> memory, Driver::Address target,
                   const std::shared_ptr<Staging>& staging, const Options& options) {
    const uint64_t block = staging->block();
    const auto send = [&](Lane& lane, size_t index, uint64_t whole) {
        lane.send(target + index * block, whole, [&](uint64_t done, std::span<std::byte> piece) {
            std::memcpy(piece.data(), memory.data() + index * block + done, piece.size());
        });
    };
    send_blocks(transfer, staging, memory.size(), copy_threads(options), options, send);
}

void download_staged(Transfer& transfer, Driver::Address source, std::span<std::byte> memory,
                     const std::shared_ptr<Staging>& staging, const Options& options) {
    const uint64_t block = staging->block();
    StagingShare share(staging);
    Stream stream(staging->device());
    std::mutex mutex;
    const size_t blocks = (memory.size() + block - 1) / block;
    parallel_for(transfer, blocks, copy_threads(options), transfer.result.cpu_seconds, [&](const Next& next) {
        stream.device().enter();
        while (const auto index = next()) {
            const auto part = memory.subspan(*index * block, std::min(block, memory.size() - *index * block));
            const Loan loan(share, transfer.cancelled());
            {
                const std::lock_guard lock(mutex);
                stream.copy(address_of(loan->memory), source + *index * block, part.size(), loan->event);
            }
            stream.wait(loan->event);
            std::memcpy(part.data(), loan->memory, part.size());
            transfer.advance(part.size());
        }
    });
    note(transfer, *staging);
}

std::unique_ptr<Transfer> move(Way way, std::span<std::byte> memory, Driver::Address device, bool registered,
                               std::shared_ptr<Staging> staging, const Options& options) {
    return std::make_unique<Transfer>(memory.size(), [=](Transfer& transfer) {
        transfer.result.block = registered ? large_copy : staging->block();
        if (!registered) {
            transfer.fell_back("through staging memory: the host's memory is not registered with the device");
            if (way == Way::to_device) upload_staged(transfer, memory, device, staging, options);
            if (way == Way::from_device) download_staged(transfer, device, memory, staging, options);
        } else if (way == Way::to_device) {
            move_registered(transfer, staging->device(), device, address_of(memory.data()), memory.size());
        } else {
            move_registered(transfer, staging->device(), address_of(memory.data()), device, memory.size());
        }
    });
}

}  // namespace

std::unique_ptr<Transfer> upload(std::span<std::byte> memory, Driver::Address target, bool registered,
                                 std::shared_ptr<Staging> staging, const Options& options) {
    return move(Way::to_device, memory, target, registered, std::move(staging), options);
}

std::unique_ptr<Transfer> download(Driver::Address source, std::span<std::byte> memory, bool registered,
                                   std::shared_ptr<Staging> staging, const Options& options) {
    return move(Way::from_device, memory, source, registered, std::move(staging), options);
}

}  // namespace flashd
