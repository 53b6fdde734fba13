/* Counts NVTX ranges of an attached process: a tool as Nsight is one, by the binary interface of NVTX 3.
   The process loads it through NVTX_INJECTION64_PATH and calls InitializeInjectionNvtx2. At exit one line a fact goes to
   the file named by NVTX_COUNTS: `domain`, `name` and its pushes, `pushes`, `pops`, `deepest`, `open`. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef void (*function_pointer)(void);
typedef const void *(*get_export_table)(uint32_t id);
typedef struct {
    size_t struct_size;
    int (*get_module_function_table)(int module, function_pointer ***table, unsigned int *size);
} callbacks_table;

/* nvtxEventAttributes_t, version 3: the head, a category, a colour, a payload, then the message. */
typedef struct {
    uint16_t version, size;
    uint32_t category;
    int32_t color_type;
    uint32_t color;
    int32_t payload_type, reserved;
    union { uint64_t u64; double f64; } payload;
    int32_t message_type;
    union { const char *ascii; void *registered; } message;
} attributes;

enum { TABLE_CALLBACKS = 1, MODULE_CORE2 = 5 };
enum { RANGE_PUSH = 4, RANGE_POP = 5, REGISTER_STRING = 10, DOMAIN_CREATE = 12 };
enum { MESSAGE_ASCII = 1, MESSAGE_REGISTERED = 3, MOST_NAMES = 4096 };

typedef struct { char name[64]; } domain;
static struct { char name[64]; long pushes; } names[MOST_NAMES];
static int name_count;
static long pushes, pops, open_now, deepest;

static void *domain_create(const char *name) {
    domain *made = calloc(1, sizeof(domain));
    strncpy(made->name, name, sizeof(made->name) - 1);
    return made;
}

static void *register_string(void *in, const char *text) { (void)in; return strdup(text); }

static int range_push(void *in, const attributes *event) {
    if (in == NULL || strcmp(((domain *)in)->name, "speedlab") != 0) return 0;
    const char *text = event->message_type == MESSAGE_REGISTERED ? event->message.registered
                     : event->message_type == MESSAGE_ASCII ? event->message.ascii : "?";
    int n = 0;
    while (n < name_count && strcmp(names[n].name, text) != 0) n++;
    if (n == name_count && n < MOST_NAMES) strncpy(names[name_count++].name, text, sizeof(names[0].name) - 1);
    names[n].pushes++;
    pushes++;
    if (++open_now > deepest) deepest = open_now;
    return (int)open_now - 1;
}

static int range_pop(void *in) {
    if (in == NULL || strcmp(((domain *)in)->name, "speedlab") != 0) return 0;
    pops++;
    return (int)--open_now;
}

static void report(void) {
    const char *path = getenv("NVTX_COUNTS");
    FILE *file = path == NULL ? NULL : fopen(path, "w");
    if (file == NULL) return;
    for (int n = 0; n < name_count; n++) fprintf(file, "name %s %ld\n", names[n].name, names[n].pushes);
    fprintf(file, "pushes %ld\npops %ld\ndeepest %ld\nopen %ld\n", pushes, pops, deepest, open_now);
    fclose(file);
}

int InitializeInjectionNvtx2(get_export_table get_table) {
    const callbacks_table *callbacks = get_table(TABLE_CALLBACKS);
    function_pointer **table = NULL;
    unsigned int size = 0;
    if (callbacks == NULL || !callbacks->get_module_function_table(MODULE_CORE2, &table, &size)) return 0;
    if (size <= DOMAIN_CREATE) return 0;
    *table[RANGE_PUSH] = (function_pointer)range_push;
    *table[RANGE_POP] = (function_pointer)range_pop;
    *table[REGISTER_STRING] = (function_pointer)register_string;
    *table[DOMAIN_CREATE] = (function_pointer)domain_create;
    atexit(report);
    return 1;
}
