// SPDX-License-Identifier: Apache-2.0
#include "digest.hpp"

#include <blake3.h>

#include <cstring>

namespace flashd {

Digest digest(std::span<const std::byte> data) {
    blake3_hasher hasher;
    blake3_hasher_init(&hasher);
    blake3_hasher_update(&hasher, data.data(), data.size());
    Digest result;
    blake3_hasher_finalize(&hasher, reinterpret_cast<uint8_t*>(result.data()), result.size());
    return result;
}

bool DigestTable::matches(size_t index, const Digest& digest) const {
    return index < size() && std::memcmp(table_.data() + index * digest_bytes, digest.data(), digest_bytes) == 0;
}

}  // namespace flashd
