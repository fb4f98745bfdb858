/* The compiled kernels, as read-only data of the extension: sa_image_NAME up to sa_image_NAME_end, both hidden. */
#if defined(__ELF__)

#define SA_IMAGE(name, path) \
    .balign 64; \
    .hidden sa_image_##name; \
    .globl sa_image_##name; \
    sa_image_##name: .incbin path; \
    .hidden sa_image_##name##_end; \
    .globl sa_image_##name##_end; \
    sa_image_##name##_end: .byte 0;

    .section .rodata
#include "images.h"

    .section .note.GNU-stack, "", %progbits

#endif
