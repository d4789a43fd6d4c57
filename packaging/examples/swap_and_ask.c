/* SPDX-License-Identifier: Apache-2.0
 *
 * Swaps to a model and asks it, with sd-bus; prints the answer as JSON.
 *
 *   cc swap_and_ask.c -o swap_and_ask $(pkg-config --cflags --libs libsystemd)
 *   ./swap_and_ask MODEL QUESTION      FLASHD_BUS_ADDRESS names another bus than the system's
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <systemd/sd-bus.h>
#include <unistd.h>

#define NAME "org.flashd1"
#define ROOT "/org/flashd1"

static void fail(const char *what, const char *why) {
    fprintf(stderr, "%s: %s\n", what, why);
    exit(EXIT_FAILURE);
}

static sd_bus *open_bus(void) {
    const char *address = getenv("FLASHD_BUS_ADDRESS");
    sd_bus *bus = NULL;
    int r;

    if (!address) {
        r = sd_bus_open_system(&bus);
    } else if ((r = sd_bus_new(&bus)) >= 0 && (r = sd_bus_set_address(bus, address)) >= 0 &&
               (r = sd_bus_set_bus_client(bus, 1)) >= 0) {
        r = sd_bus_start(bus);
    }
    if (r < 0)
        fail("no bus", strerror(-r));
    sd_bus_set_allow_interactive_authorization(bus, 1);
    return bus;
}

static char *get_string(sd_bus *bus, const char *path, const char *interface, const char *property) {
    sd_bus_error error = SD_BUS_ERROR_NULL;
    char *value = NULL;

    if (sd_bus_get_property_string(bus, NAME, path, interface, property, &error, &value) < 0)
        fail(error.name, error.message);
    return value;
}

/* Someone interrupts the wait of wait_for(); what happened is read from the job itself. */
static int wake(sd_bus_message *message, void *userdata, sd_bus_error *error) {
    (void)message, (void)userdata, (void)error;
    return 0;
}

static void wait_for(sd_bus *bus, const char *job) {
    for (;;) {
        char *state = get_string(bus, job, "org.flashd1.Job", "State");
        int done = strcmp(state, "done") == 0;
        int failed = strcmp(state, "failed") == 0 || strcmp(state, "cancelled") == 0;

        free(state);
        if (done)
            return;
        if (failed) {
            sd_bus_error error = SD_BUS_ERROR_NULL;
            sd_bus_message *reply = NULL;
            const char *name = "", *text = "", *hint = "";

            sd_bus_get_property(bus, NAME, job, "org.flashd1.Job", "Error", &error, &reply, "(sss)");
            if (reply)
                sd_bus_message_read(reply, "(sss)", &name, &text, &hint);
            fail(name, text);
        }
        while (sd_bus_process(bus, NULL) > 0)
            ;
        sd_bus_wait(bus, 100 * 1000); /* microseconds: a signal that came before is no reason to wait for ever */
    }
}

static void swap(sd_bus *bus, const char *model) {
    sd_bus_error error = SD_BUS_ERROR_NULL;
    sd_bus_message *reply = NULL;
    const char *job;

    sd_bus_match_signal(bus, NULL, NAME, NULL, "org.flashd1.Job", "Finished", wake, NULL);
    if (sd_bus_call_method(bus, NAME, ROOT, "org.flashd1.Manager", "Swap", &error, &reply, "sa{sv}", model, 0) < 0)
        fail(error.name, error.message);
    if (sd_bus_message_read(reply, "o", &job) < 0)
        fail("Swap", "an answer that is no object path");
    wait_for(bus, job);
    sd_bus_message_unref(reply);
}

/* The question as a JSON string, without the quotation marks around it. */
static char *quoted(const char *text) {
    char *result = malloc(6 * strlen(text) + 1), *out = result;

    if (!result)
        fail("memory", strerror(errno));
    for (; *text; text++) {
        if (*text == '"' || *text == '\\')
            out += sprintf(out, "\\%c", *text);
        else if ((unsigned char)*text < 0x20)
            out += sprintf(out, "\\u%04x", *text);
        else
            *out++ = *text;
    }
    *out = '\0';
    return result;
}

static void ask(const char *endpoint, const char *question) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    char *escaped = quoted(question), *body, *answer = NULL, *content;
    size_t size;
    FILE *stream;

    if (strlen(endpoint) >= sizeof address.sun_path)
        fail(endpoint, "too long");
    strcpy(address.sun_path, endpoint);
    if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address) < 0)
        fail(endpoint, strerror(errno));
    if (asprintf(&body, "{\"messages\": [{\"role\": \"user\", \"content\": \"%s\"}]}", escaped) < 0)
        fail("memory", strerror(errno));
    dprintf(fd,
            "POST /v1/chat/completions HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            "Content-Length: %zu\r\n\r\n%s",
            strlen(body), body);

    stream = fdopen(fd, "r");
    if (!stream || getdelim(&answer, &(size_t){0}, '\0', stream) < 0)
        fail(endpoint, "no answer");
    content = strstr(answer, "\r\n\r\n");
    size = strcspn(answer, "\r");
    if (!content || !memmem(answer, size, " 200 ", 5))
        fail(endpoint, answer);
    puts(content + 4);
    free(answer), free(body), free(escaped);
    fclose(stream);
}

int main(int argc, char *argv[]) {
    if (argc != 3)
        fail("usage", "swap_and_ask MODEL QUESTION");
    sd_bus *bus = open_bus();
    swap(bus, argv[1]);
    char *endpoint = get_string(bus, ROOT, "org.flashd1.Manager", "Endpoint");
    ask(endpoint, argv[2]);
    free(endpoint);
    sd_bus_flush_close_unref(bus);
    return EXIT_SUCCESS;
}
