// SPDX-License-Identifier: Apache-2.0
#include "digest.hpp"

#include <blake3.h>

#include <cstring>

#include "error.hpp"

namespace flashd {

Digest digest(std::span<const std::byte> data) {
    blake3_hasher hasher;
    blake3_hasher_init(&hasher);
    blake3_hasher_update(&hasher, data.data(), data.size());
    Digest result;
    blake3_hasher_finalize(&hasher, reinterpret_cast<uint8_t*>(result.data()), result.size());
    return result;
}

void DigestTable::check(size_t index, std::span<const std::byte> data, const std::string& path, uint64_t offset) const {
    const Digest found = digest(data);
    if (index >= size() || std::memcmp(table_.data() + index * digest_bytes, found.data(), digest_bytes) != 0)
        throw Error(Failure::corrupt, "digest", 0, path, offset);
}

}  // namespace flashd
