// SPDX-License-Identifier: Apache-2.0
// BLAKE3 of blocks. One digest serves verification, content address and deduplication: it is cryptographic, so that
// no two checkpoints can be made to share an address, and fast enough (5.6 GB/s per core with AVX-512) to run during a
// load.
#pragma once

#include <blake3.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace flashd {

inline constexpr size_t digest_bytes = 32;
using Digest = std::array<std::byte, digest_bytes>;

Digest digest(std::span<const std::byte> data);

// The digest of data that arrives in pieces.
class Hasher {
  public:
    Hasher() { blake3_hasher_init(&state_); }
    void update(std::span<const std::byte> data) { blake3_hasher_update(&state_, data.data(), data.size()); }
    Digest finish() const;

  private:
    blake3_hasher state_;
};

// The digests of consecutive blocks of a region; the last block may be short.
class DigestTable {
  public:
    DigestTable() = default;
    DigestTable(uint64_t block, std::string table) : block_(block), table_(std::move(table)) {}

    bool empty() const { return table_.empty(); }
    uint64_t block() const { return block_; }
    size_t size() const { return table_.size() / digest_bytes; }
    // Throws Error (corrupt) unless `data`, found at `offset` of the file named `path`, is block number `index`.
    void check(size_t index, std::span<const std::byte> data, const std::string& path, uint64_t offset) const;
    // The same for the block's digest.
    void check(size_t index, const Digest& found, const std::string& path, uint64_t offset) const;

  private:
    uint64_t block_ = 0;
    std::string table_;
};

}  // namespace flashd
