/* The C core without Python. Usage: kernels [TABLE ...]: the named tables must be usable; without names, every usable one is tested. */
#include "test.h"

int failures;

static bool asked_for(const char *name, int count, char **names)
{
    for (int i = 0; i < count; i++) {
        if (strcmp(name, names[i]) == 0) {
            return true;
        }
    }
    return count == 0;
}

int main(int count, char **arguments)
{
    int tested = 0;
    printf("core: %lld checks\n", (long long)test_core());
    for (int i = 0; i < sa_table_count(); i++) {
        const char *name = sa_table_name(i);
        if (!asked_for(name, count - 1, arguments + 1)) {
            continue;
        }
        if (!sa_table_usable(i)) {
            EXPECT(count == 1, "table %s is not usable here", name);
            continue;
        }
        EXPECT(sa_table_use(name) == SA_OK, "%s", sa_message());
        const int64_t streams = test_cache(), calls = test_kernels();
        printf("%s: %lld streams, %lld calls\n", name, (long long)streams, (long long)calls);
        tested++;
    }
    EXPECT(tested >= max_i64(count - 1, 1), "%d tables tested, %d asked for", tested, count - 1);
    printf(failures ? "%d FAILED\n" : "all right\n", failures);
    return failures != 0;
}
