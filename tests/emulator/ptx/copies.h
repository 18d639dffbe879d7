// What the two kinds of asynchronous copies share: their opcode.
#pragma once

#include "builder.h"

namespace ptxemu {

void build_copy(Builder&);  // cp.async
void build_bulk(Builder&);  // cp.async.bulk

}  // namespace ptxemu
