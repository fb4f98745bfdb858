/* Runs a harness over a corpus without libFuzzer: one input a line, in hexadecimal. Prints how many ran. */
#include "fuzz.h"

static int digit(int c)
{
    return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

int main(int count, char **paths)
{
    long runs = 0;
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
