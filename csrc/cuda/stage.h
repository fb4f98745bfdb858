/* The parameter of the kernel that writes words of the host. */
#ifndef SA_STAGE_H
#define SA_STAGE_H

#include <stdint.h>

enum { SA_STAGE_WORDS = 1000 }; /* parameters of a launch hold 4 KB */

typedef struct sa_stage {
    uint32_t *target;
    int32_t count;
    int32_t padding;
    uint32_t words[SA_STAGE_WORDS];
} sa_stage;

#endif
