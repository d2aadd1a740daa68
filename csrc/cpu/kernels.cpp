// All kernels for one instruction set: SWITCHKD_CAPABILITY and SWITCHKD_LANES, given by the build.
#include "linear.h"
#include "loss.h"
#include "select.h"

namespace switchkd {
inline namespace SWITCHKD_CAPABILITY {

extern const Kernels KERNELS = {scan, measure, filtered_token, totals, unit_gradient,
                                gradient, logit, linear_rows, linear_columns};

}  // namespace SWITCHKD_CAPABILITY
}  // namespace switchkd
