/* Tensors as the copy engine of Hopper sees them. */
#ifndef SA_MAPS_H
#define SA_MAPS_H

#include "driver.h"

/* Fills the maps of a call from its problem, for a kernel of this form. Some 100 ns each; nothing of it touches the device. */
sa_status sa_device_map(const char *function, const sa_cuda_form *form, sa_cuda_prefill *prefill);

#endif
