// SPDX-License-Identifier: Apache-2.0
// Transfers that end or begin in a device's memory.
#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "digest.hpp"
#include "driver.hpp"
#include "file.hpp"
#include "staging.hpp"
#include "transfer.hpp"

namespace flashd {

// Reads [start, start + length) of a file through the staging memory: reads, copies and digests overlap. With digests,
// their blocks must be as large as the staging memory's.
std::unique_ptr<Transfer> load_device(File file, uint64_t start, uint64_t length, Driver::Address target,
                                      DigestTable digests, std::shared_ptr<Staging> staging, const Options& options);

// Writes device memory to a file, which then ends where the memory does, and is fsynced. The result has the digest of
// each block as large as the staging memory's.
std::unique_ptr<Transfer> write_device(File target, uint64_t offset, Driver::Address source, uint64_t length,
                                       std::shared_ptr<Staging> staging, const Options& options);

// Host memory to a device, or back. Registered memory goes in few large copies; other memory through the staging
// memory, by as many threads as `options.copy_threads` says.
std::unique_ptr<Transfer> upload(std::span<std::byte> memory, Driver::Address target, bool registered,
                                 std::shared_ptr<Staging> staging, const Options& options);
std::unique_ptr<Transfer> download(Driver::Address source, std::span<std::byte> memory, bool registered,
                                   std::shared_ptr<Staging> staging, const Options& options);

}  // namespace flashd
