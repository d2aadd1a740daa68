// CUDA, or what stands in for it in tests.
#pragma once

#if defined(SWITCHKD_EMULATED)
#include "emulated.h"
#else
#include "hopper.h"
#endif
