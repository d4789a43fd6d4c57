// SPDX-License-Identifier: Apache-2.0
#include "uring.hpp"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <utility>

namespace flashd {

namespace {

unsigned load_acquire(unsigned* value) { return std::atomic_ref(*value).load(std::memory_order_acquire); }
void store_release(unsigned* value, unsigned to) { std::atomic_ref(*value).store(to, std::memory_order_release); }

void* map(int fd, size_t size, off_t offset) {
    return ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, offset);
}

}  // namespace

std::optional<Ring> Ring::create(unsigned entries, std::string& refused, int& number) {
    const auto refuse = [&](int with, const std::string& why) {
        number = with;
        refused = "io_uring refused: " + why;
        return std::nullopt;
    };
    io_uring_params parameters{};
    Ring ring;
    ring.fd_ = UniqueFd(static_cast<int>(::syscall(__NR_io_uring_setup, entries, &parameters)));
    if (!ring.fd_) return refuse(errno, std::strerror(errno));
    if ((parameters.features & IORING_FEAT_SINGLE_MMAP) == 0) return refuse(ENOSYS, "the kernel is older than 5.4");
    const auto& sq = parameters.sq_off;
    const auto& cq = parameters.cq_off;
    ring.rings_size_ = std::max<size_t>(sq.array + parameters.sq_entries * sizeof(unsigned),
                                        cq.cqes + parameters.cq_entries * sizeof(io_uring_cqe));
    ring.entries_size_ = parameters.sq_entries * sizeof(io_uring_sqe);
    void* rings = map(ring.fd_.get(), ring.rings_size_, IORING_OFF_SQ_RING);
    if (rings != MAP_FAILED) ring.rings_ = rings;
    void* submissions = map(ring.fd_.get(), ring.entries_size_, static_cast<off_t>(IORING_OFF_SQES));
    if (submissions != MAP_FAILED) ring.entries_ = static_cast<io_uring_sqe*>(submissions);
    if (ring.rings_ == nullptr || ring.entries_ == nullptr)
        return refuse(errno, std::string("mmap: ") + std::strerror(errno));
    auto* base = static_cast<std::byte*>(ring.rings_);
    const auto at = [base](uint32_t offset) { return reinterpret_cast<unsigned*>(base + offset); };
    ring.submit_tail_ = at(sq.tail);
    ring.submit_mask_ = *at(sq.ring_mask);
    ring.complete_head_ = at(cq.head);
    ring.complete_tail_ = at(cq.tail);
    ring.complete_mask_ = *at(cq.ring_mask);
    ring.completions_ = reinterpret_cast<io_uring_cqe*>(base + cq.cqes);
    // Entry i of the ring is always submission i: the indirection that the array offers is not used.
    for (unsigned i = 0; i < parameters.sq_entries; ++i) at(sq.array)[i] = i;
    return ring;
}

Ring::Ring(Ring&& other) noexcept
    : fd_(std::move(other.fd_)),
      rings_(std::exchange(other.rings_, nullptr)),
      rings_size_(other.rings_size_),
      entries_(std::exchange(other.entries_, nullptr)),
      entries_size_(other.entries_size_),
      submit_tail_(other.submit_tail_),
      submit_mask_(other.submit_mask_),
      complete_head_(other.complete_head_),
      complete_tail_(other.complete_tail_),
      complete_mask_(other.complete_mask_),
      completions_(other.completions_),
      prepared_(other.prepared_),
      published_(other.published_) {}

Ring::~Ring() {
    if (entries_ != nullptr) ::munmap(entries_, entries_size_);
    if (rings_ != nullptr) ::munmap(rings_, rings_size_);
}

bool Ring::register_files(std::span<const int> fds) {
    return ::syscall(__NR_io_uring_register, fd_.get(), IORING_REGISTER_FILES, fds.data(), fds.size()) == 0;
}

bool Ring::register_buffer_table(unsigned count) {
    io_uring_rsrc_register table{};
    table.nr = count;
    table.flags = IORING_RSRC_REGISTER_SPARSE;
    return ::syscall(__NR_io_uring_register, fd_.get(), IORING_REGISTER_BUFFERS2, &table, sizeof table) == 0;
}

bool Ring::register_buffer(unsigned index, iovec buffer) {
    io_uring_rsrc_update2 update{};
    update.offset = index;
    update.data = reinterpret_cast<uintptr_t>(&buffer);
    update.nr = 1;
    return ::syscall(__NR_io_uring_register, fd_.get(), IORING_REGISTER_BUFFERS_UPDATE, &update, sizeof update) == 1;
}

io_uring_sqe& Ring::prepare() {
    const unsigned tail = *submit_tail_ + prepared_++;
    io_uring_sqe& entry = entries_[tail & submit_mask_];
    std::memset(&entry, 0, sizeof entry);
    return entry;
}

int Ring::enter(unsigned completions) {
    store_release(submit_tail_, *submit_tail_ + prepared_);
    published_ += std::exchange(prepared_, 0);
    const unsigned flags = completions > 0 ? IORING_ENTER_GETEVENTS : 0;
    for (;;) {
        const long taken =
            ::syscall(__NR_io_uring_enter, fd_.get(), published_, completions, flags, nullptr, size_t{0});
        if (taken >= 0) published_ -= static_cast<unsigned>(taken);
        if (taken >= 0 && published_ == 0) return 0;
        // EAGAIN and EBUSY: the kernel has no room at the moment. Completions free some, and the next call submits the
        // rest.
        if (taken < 0 && errno != EINTR) return errno == EAGAIN || errno == EBUSY ? 0 : errno;
    }
}

std::optional<Ring::Completion> Ring::next_completion() {
    const unsigned head = *complete_head_;
    if (head == load_acquire(complete_tail_)) return std::nullopt;
    const io_uring_cqe& entry = completions_[head & complete_mask_];
    const Completion completion{entry.user_data, entry.res};
    store_release(complete_head_, head + 1);
    return completion;
}

}  // namespace flashd
