// SPDX-License-Identifier: Apache-2.0
// Pinned memory between files and a device: allocated once, limited, and shared fairly by all running transfers.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <utility>
#include <vector>

#include "driver.hpp"
#include "memory.hpp"

namespace flashd {

class Staging {
  public:
    // A part of the memory, and the event of the device's last use of it.
    struct Block {
        std::byte* memory;
        Driver::Event event;
    };

    Staging(const Device& device, uint64_t block, unsigned count);
    ~Staging();
    Staging(const Staging&) = delete;
    Staging& operator=(const Staging&) = delete;

    const Device& device() const { return device_; }
    uint64_t block() const { return block_; }
    std::span<std::byte> memory() const { return {buffer_.data(), buffer_.size()}; }
    // Returns the most bytes that were ever in use at once.
    uint64_t peak() const { return peak_ * block_; }

  private:
    friend class StagingShare;

    Device device_;
    uint64_t block_;
    Buffer buffer_;
    std::vector<Block> blocks_;
    std::mutex mutex_;
    std::condition_variable changed_;
    std::vector<Block*> free_;
    unsigned sharers_ = 0;
    std::atomic<uint64_t> peak_{0};
};

// The share of one transfer: with n running transfers an n-th of the memory, so that none waits for another's disk.
class StagingShare {
  public:
    explicit StagingShare(std::shared_ptr<Staging> staging);
    ~StagingShare();  // gives back what is still taken: nothing may use it any more
    StagingShare(const StagingShare&) = delete;
    StagingShare& operator=(const StagingShare&) = delete;

    Staging& staging() const { return *staging_; }
    // Returns a block, or nullptr if none is free and the caller may not wait. Throws Error (cancelled).
    Staging::Block* take(bool may_wait, const std::atomic<bool>& cancelled);
    void give_back(Staging::Block* block);
    // Tells whether others wait for blocks while this share has more than its part.
    bool is_wanted() const;
    // Returns the block with this memory.
    Staging::Block* block_at(const std::byte* memory) const;

  private:
    size_t fair() const;
    bool may_take() const;

    std::shared_ptr<Staging> staging_;
    std::vector<Staging::Block*> taken_;
};

// A block that is given back at the end of its scope, unless it was passed on.
class Loan {
  public:
    Loan(StagingShare& share, Staging::Block* block) : share_(share), block_(block) {}
    Loan(StagingShare& share, const std::atomic<bool>& cancelled) : Loan(share, share.take(true, cancelled)) {}
    ~Loan() {
        if (block_ != nullptr) share_.give_back(block_);
    }
    Loan(const Loan&) = delete;
    Loan& operator=(const Loan&) = delete;

    Staging::Block* operator->() const { return block_; }
    Staging::Block* get() const { return block_; }
    void handed_on() { block_ = nullptr; }
    // Exchanges it for another block after others have had their turn.
    void exchange(const std::atomic<bool>& cancelled) {
        share_.give_back(std::exchange(block_, nullptr));
        block_ = share_.take(true, cancelled);
    }

  private:
    StagingShare& share_;
    Staging::Block* block_;
};

}  // namespace flashd
