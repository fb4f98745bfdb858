/* Runs a harness over a corpus without libFuzzer: one input a line, in hexadecimal. Prints how many ran.
 * With "memory", "undefined" or "integer" in place of a file: a mistake on purpose, which the tool that watches must catch. */
#include "fuzz.h"

static int digit(int c)
{
    return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

static int canary(const char *kind)
{
    void *(*volatile take)(size_t) = malloc; /* volatile: the compiler must not see through it */
    volatile char *block = take(16);
    if (block == NULL) {
        return 0;
    }
    if (strcmp(kind, "memory") == 0 && block[16] == 1) { /* behind the block */
        printf("1\n");
    } else if (strcmp(kind, "undefined") == 0 && block[3] == 1) { /* never written */
        printf("2\n");
    } else if (strcmp(kind, "integer") == 0) {
        volatile int64_t most = INT64_MAX;
        most = most + 1;
    }
    free((void *)(uintptr_t)block);
    printf("missed\n");
    return 0;
}

int main(int count, char **paths)
{
    long runs = 0;
    if (count == 2 && strchr(paths[1], '/') == NULL) {
        return canary(paths[1]);
    }
    for (int i = 1; i < count; i++) {
        FILE *file = fopen(paths[i], "r");
        FUZZ_REQUIRE(file != NULL);
        static uint8_t bytes[1 << 16];
        size_t size = 0;
        int high = -1;
        for (int c = fgetc(file); c != EOF; c = fgetc(file)) {
            if (c == '\n') {
                uint8_t *exact = fuzz_memory((int64_t)size, 1);
                memcpy(exact, bytes, size);
                (void)LLVMFuzzerTestOneInput(exact, size);
                free(exact);
                runs++;
                size = 0;
            } else if (high < 0) {
                high = digit(c);
            } else {
                FUZZ_REQUIRE(size < sizeof bytes && digit(c) >= 0);
                bytes[size++] = (uint8_t)(high << 4 | digit(c));
                high = -1;
            }
        }
        fclose(file);
    }
    printf("%ld\n", runs);
    return 0;
}
