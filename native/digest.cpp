// SPDX-License-Identifier: Apache-2.0
#include "digest.hpp"

#include <cstring>

#include "error.hpp"

namespace flashd {

Digest Hasher::finish() const {
    Digest result;
    blake3_hasher_finalize(&state_, reinterpret_cast<uint8_t*>(result.data()), result.size());
    return result;
}

Digest digest(std::span<const std::byte> data) {
    Hasher hasher;
    hasher.update(data);
    return hasher.finish();
}

void DigestTable::check(size_t index, std::span<const std::byte> data, const std::string& path, uint64_t offset) const {
    check(index, digest(data), path, offset);
}

void DigestTable::check(size_t index, const Digest& found, const std::string& path, uint64_t offset) const {
    if (index >= size() || std::memcmp(table_.data() + index * digest_bytes, found.data(), digest_bytes) != 0)
        throw Error(Failure::corrupt, "digest", 0, path, offset);
}

}  // namespace flashd
