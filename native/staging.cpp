// SPDX-License-Identifier: Apache-2.0
#include "staging.hpp"

#include <algorithm>
#include <chrono>
#include <utility>

#include "error.hpp"

namespace flashd {

Staging::Staging(const Device& device, uint64_t block, unsigned count)
    : device_(device), block_(block), buffer_(block * count) {
    device_.enter();
    if (const int error = populate(memory()); error != 0) throw Error(Failure::memory, "populate", error, "");
    device_.check(device_.driver->register_memory(buffer_.data(), buffer_.size(), 0), "register staging memory");
    blocks_.reserve(count);
    try {
        for (unsigned i = 0; i < count; ++i) {
            Driver::Event event = nullptr;
            device_.check(device_.driver->create_event(&event, no_timing), "create event");
            blocks_.push_back({buffer_.data() + i * block, event});
        }
    } catch (...) {
        for (const Block& made : blocks_) device_.driver->destroy_event(made.event);
        device_.driver->unregister_memory(buffer_.data());
        throw;
    }
    for (Block& made : blocks_) free_.push_back(&made);
}

Staging::~Staging() {
    if (device_.driver->set_context(device_.context) != 0) return;  // the driver is going away, and all with it
    for (const Block& block : blocks_) device_.driver->destroy_event(block.event);
    device_.driver->unregister_memory(buffer_.data());
}

StagingShare::StagingShare(std::shared_ptr<Staging> staging) : staging_(std::move(staging)) {
    const std::lock_guard lock(staging_->mutex_);
    ++staging_->sharers_;
}

StagingShare::~StagingShare() {
    {
        const std::lock_guard lock(staging_->mutex_);
        --staging_->sharers_;
        staging_->free_.insert(staging_->free_.end(), taken_.begin(), taken_.end());
    }
    staging_->changed_.notify_all();
}

size_t StagingShare::fair() const { return std::max<size_t>(1, staging_->blocks_.size() / staging_->sharers_); }

bool StagingShare::may_take() const { return !staging_->free_.empty() && taken_.size() < fair(); }

bool StagingShare::is_wanted() const {
    const std::lock_guard lock(staging_->mutex_);
    return staging_->free_.empty() && taken_.size() > fair();
}

Staging::Block* StagingShare::take(bool may_wait, const std::atomic<bool>& cancelled) {
    std::unique_lock lock(staging_->mutex_);
    while (!may_take()) {
        if (!may_wait) return nullptr;
        // A cancel does not notify this condition.
        staging_->changed_.wait_for(lock, std::chrono::milliseconds(20));
        if (cancelled) throw Error(Failure::cancelled, "transfer", 0, "");
    }
    Staging::Block* block = staging_->free_.back();
    staging_->free_.pop_back();
    taken_.push_back(block);
    const uint64_t used = staging_->blocks_.size() - staging_->free_.size();
    if (used > staging_->peak_) staging_->peak_ = used;
    return block;
}

void StagingShare::give_back(Staging::Block* block) {
    {
        const std::lock_guard lock(staging_->mutex_);
        std::erase(taken_, block);
        staging_->free_.push_back(block);
    }
    staging_->changed_.notify_all();
}

Staging::Block* StagingShare::block_at(const std::byte* memory) const {
    return &staging_->blocks_[static_cast<size_t>(memory - staging_->buffer_.data()) / staging_->block_];
}

}  // namespace flashd
