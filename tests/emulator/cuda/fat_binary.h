// What nvcc embeds in an object file for the driver.
#pragma once

#include <string>
#include <vector>

#include "../ptx/ptxemu.h"
#include "emulation.h"

namespace cudaemu {

struct Image {  // one PTX text
  int architecture;
  bool is_specific;  // sm_90a
  std::string ptx;
  ptxemu_module* module = nullptr;  // made when it is first asked for

  bool runs_on(const Device& device) const {
    return is_specific ? architecture == device.capability() : architecture <= device.capability();
  }
};

// Of a fat binary that was made with --compress-mode=none.
std::vector<Image> images_of(const void* fat_binary);

}  // namespace cudaemu
