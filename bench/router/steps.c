/* Measures latency for bench/router: each of N slots sends a request, waits for its answer, and begins again.
 *
 *   steps SLOTS SECONDS BODY_FILE ROUTER_PORT             one request a turn, to a router
 *   steps SLOTS SECONDS BODY_FILE PREFILL_PORT DECODE_PORT  two requests a turn, as a client without a router would
 *
 * Prints one line: turns, failures, and the 50th and 99th percentile of a turn in microseconds.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { MAX_SLOTS = 1024, ANSWER = 1 << 16, MAX_TURNS = 4000000 };

struct slot {
    int fd[2];
    int step;
    size_t sent, got;
    double began;
    char answer[ANSWER];
};

static char *request;
static size_t request_size;
static int steps, epoll;
static double *turns;
static long count, failures;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec / 1e3;
}

static int connect_to(int port) {
    int fd = socket(AF_INET, SOCK_STREAM, 0), one = 1;
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((unsigned short)port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (connect(fd, (struct sockaddr *)&address, sizeof address)) {
        fprintf(stderr, "steps: cannot connect to port %d: %s\n", port, strerror(errno));
        exit(1);
    }
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    return fd;
}

static void send_step(struct slot *s) {
    size_t sent = 0;
    while (sent < request_size) {
        ssize_t n = write(s->fd[s->step], request + sent, request_size - sent);
        if (n <= 0) { fprintf(stderr, "steps: write failed: %s\n", strerror(errno)); exit(1); }
        sent += (size_t)n;
    }
    s->got = 0;
}

static int complete(struct slot *s) {
    s->answer[s->got] = 0;
    char *end = strstr(s->answer, "\r\n\r\n");
    if (end == NULL) return 0;
    char *length = strcasestr(s->answer, "content-length:");
    size_t body = length != NULL && length < end ? strtoul(length + 15, NULL, 10) : 0;
    return s->got >= (size_t)(end - s->answer) + 4 + body;
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

int main(int argc, char **argv) {
    if (argc < 5 || argc > 6) { fprintf(stderr, "usage: steps SLOTS SECONDS BODY_FILE PORT [DECODE_PORT]\n"); return 2; }
    int slots = atoi(argv[1]);
    double seconds = atof(argv[2]);
    steps = argc - 4;
    FILE *file = fopen(argv[3], "r");
    if (file == NULL || slots < 1 || slots > MAX_SLOTS) { fprintf(stderr, "steps: bad arguments\n"); return 2; }
    static char body[1 << 20];
    size_t size = fread(body, 1, sizeof body, file);
    request = malloc(size + 256);
    request_size = (size_t)sprintf(request,
        "POST /v1/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\ncontent-length: %zu\r\n\r\n", size);
    memcpy(request + request_size, body, size);
    request_size += size;
    turns = malloc(MAX_TURNS * sizeof *turns);
    epoll = epoll_create1(0);
    struct slot *all = calloc((size_t)slots, sizeof *all);
    for (int i = 0; i < slots; i++)
        for (int k = 0; k < steps; k++) {
            all[i].fd[k] = connect_to(atoi(argv[4 + k]));
            struct epoll_event event = {.events = EPOLLIN, .data.ptr = &all[i]};
            epoll_ctl(epoll, EPOLL_CTL_ADD, all[i].fd[k], &event);
        }
    double start = now(), end = start + seconds * 1e6;
    for (int i = 0; i < slots; i++) { all[i].began = now(); send_step(&all[i]); }
    struct epoll_event events[256];
    while (now() < end && count < MAX_TURNS) {
        int n = epoll_wait(epoll, events, 256, 100);
        for (int i = 0; i < n; i++) {
            struct slot *s = events[i].data.ptr;
            ssize_t got = read(s->fd[s->step], s->answer + s->got, ANSWER - 1 - s->got);
            if (got <= 0) { fprintf(stderr, "steps: connection closed\n"); return 1; }
            s->got += (size_t)got;
            if (!complete(s)) continue;
            if (strncmp(s->answer + 9, "200", 3) != 0) failures++;
            if (++s->step == steps) {
                s->step = 0;
                if (count < MAX_TURNS) turns[count++] = now() - s->began;
                s->began = now();
            }
            send_step(s);
        }
    }
    qsort(turns, (size_t)count, sizeof *turns, by_value);
    printf("%ld %ld %.1f %.1f\n", count, failures, turns[count / 2], turns[(long)((double)count * 0.99)]);
    return 0;
}
