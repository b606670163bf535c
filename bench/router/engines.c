/* Stand-in engines for bench/router: they answer like vLLM and cost almost nothing.
 *
 * One process, one epoll loop, any number of ports. A prefill port answers with a ticket, a decode port with a whole
 * answer or with a stream of chunks: all at once, or one every tick until the client leaves or enough were sent.
 *
 *   engines PREFILL_PORT COUNT DECODE_PORT COUNT CHUNKS TICK_MS METRICS_FILE
 *
 * TICK_MS 0 sends all chunks at once. GET /count on the first decode port tells how many chunks were sent.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <unistd.h>

enum { BUFFER = 65536, MAX_FD = 65536, PHASES = 8 };

struct connection {
    int decode;       /* which role its port has */
    int left;         /* chunks still to send, when ticking */
    size_t used;      /* bytes in `buffer` */
    size_t skip;      /* body bytes still to read and drop */
    int streaming;    /* what the request being dropped asked for */
    int pending;      /* a request whose body is being dropped */
    int next, previous; /* live streams of one phase, by file descriptor */
    int phase;
    char *buffer;
};

static struct connection *connections[MAX_FD];
static int heads[PHASES], epoll, chunks, tick, ticking;
static unsigned long sent;
static char *metrics;
static size_t metrics_size;
static int phase_of_next;

static const char CHUNK[] =
    "data: {\"id\":\"cmpl-0f2c\",\"object\":\"text_completion\",\"created\":1700000000,\"model\":\"llama31\","
    "\"choices\":[{\"index\":0,\"text\":\" word\",\"logprobs\":null,\"finish_reason\":null,\"stop_reason\":null,"
    "\"token_ids\":null}],\"usage\":null}\n\n";
static const char LAST[] = "data: [DONE]\n\n";
static const char STREAM_HEAD[] =
    "HTTP/1.1 200 OK\r\ndate: Mon, 01 Jan 2026 00:00:00 GMT\r\nserver: uvicorn\r\n"
    "content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n";
static const char TICKET[] =
    "{\"id\":\"cmpl-0f2c\",\"object\":\"text_completion\",\"created\":1700000000,\"model\":\"llama31\",\"choices\":"
    "[{\"index\":0,\"text\":\" a\",\"logprobs\":null,\"finish_reason\":\"length\",\"stop_reason\":null}],"
    "\"usage\":{\"prompt_tokens\":30,\"total_tokens\":31,\"completion_tokens\":1},\"kv_transfer_params\":"
    "{\"do_remote_prefill\":true,\"do_remote_decode\":false,\"remote_block_ids\":[[1,2,3]],\"remote_engine_id\":"
    "\"5c6e0e3e-7d0e-4c55-b4b2-8e5d3a1d0c11\",\"remote_request_id\":\"cmpl-0f2c-0-9b1deb4d\",\"remote_host\":"
    "\"127.0.0.1\",\"remote_port\":5600,\"tp_size\":1,\"remote_num_tokens\":30}}";
static const char ANSWER[] =
    "{\"id\":\"cmpl-0f2c\",\"object\":\"text_completion\",\"created\":1700000000,\"model\":\"llama31\",\"choices\":"
    "[{\"index\":0,\"text\":\" one two three four five six seven eight nine ten\",\"logprobs\":null,"
    "\"finish_reason\":\"length\",\"stop_reason\":null}],\"usage\":{\"prompt_tokens\":30,\"total_tokens\":46,"
    "\"completion_tokens\":16}}";
static const char MODELS[] =
    "{\"object\":\"list\",\"data\":[{\"id\":\"llama31\",\"object\":\"model\",\"created\":1700000000,"
    "\"owned_by\":\"vllm\",\"root\":\"llama31\",\"parent\":null,\"max_model_len\":32768}]}";

static const char VERSION[] = "{\"version\":\"0.32.0\"}";

static char *burst;
static size_t burst_size;
static char piece[1024];
static size_t piece_size;

static void put(int fd, const char *data, size_t size) {
    while (size > 0) {
        ssize_t n = write(fd, data, size);
        if (n < 0 && (errno == EAGAIN || errno == EINTR)) { usleep(50); continue; }
        if (n <= 0) return;
        data += n;
        size -= (size_t)n;
    }
}

static void answer(int fd, const char *type, const char *body, size_t size) {
    static char out[1 << 20];
    int n = snprintf(out, 512,
        "HTTP/1.1 200 OK\r\ndate: Mon, 01 Jan 2026 00:00:00 GMT\r\nserver: uvicorn\r\ncontent-length: %zu\r\n"
        "content-type: %s\r\n\r\n", size, type);
    memcpy(out + n, body, size);
    put(fd, out, (size_t)n + size);
}

static void unlink_stream(int fd) {
    struct connection *c = connections[fd];
    if (c->phase < 0) return;
    if (c->previous >= 0) connections[c->previous]->next = c->next; else heads[c->phase] = c->next;
    if (c->next >= 0) connections[c->next]->previous = c->previous;
    c->phase = -1;
}

static void drop(int fd) {
    unlink_stream(fd);
    free(connections[fd]->buffer);
    free(connections[fd]);
    connections[fd] = NULL;
    close(fd);
}

static void serve(int fd) {
    struct connection *c = connections[fd];
    if (!c->decode) { answer(fd, "application/json", TICKET, sizeof TICKET - 1); return; }
    if (!c->streaming) { answer(fd, "application/json", ANSWER, sizeof ANSWER - 1); return; }
    if (!ticking) { put(fd, burst, burst_size); sent += (unsigned long)chunks; return; }
    put(fd, STREAM_HEAD, sizeof STREAM_HEAD - 1);
    c->left = chunks;
    c->phase = phase_of_next++ % PHASES;
    c->previous = -1;
    c->next = heads[c->phase];
    if (c->next >= 0) connections[c->next]->previous = fd;
    heads[c->phase] = fd;
}

static void step(int phase) {
    for (int fd = heads[phase], next; fd >= 0; fd = next) {
        struct connection *c = connections[fd];
        next = c->next;
        put(fd, piece, piece_size);
        sent++;
        if (--c->left == 0) {
            char end[64];
            int n = snprintf(end, sizeof end, "%zx\r\n%s\r\n0\r\n\r\n", sizeof LAST - 1, LAST);
            put(fd, end, (size_t)n);
            unlink_stream(fd);
        }
    }
}

static void read_from(int fd) {
    struct connection *c = connections[fd];
    for (;;) {
        if (c->used == BUFFER) { drop(fd); return; } /* headers larger than anything that is measured */
        ssize_t n = read(fd, c->buffer + c->used, BUFFER - c->used);
        if (n < 0 && errno == EAGAIN) return;
        if (n <= 0) { drop(fd); return; }
        c->used += (size_t)n;
        for (;;) {
            if (c->skip > 0) {
                size_t taken = c->skip < c->used ? c->skip : c->used;
                if (memmem(c->buffer, taken, "\"stream\":true", 13) || memmem(c->buffer, taken, "\"stream\": true", 14))
                    c->streaming = 1;
                memmove(c->buffer, c->buffer + taken, c->used - taken);
                c->used -= taken;
                c->skip -= taken;
                if (c->skip > 0) break;
            }
            if (c->pending) { c->pending = 0; serve(fd); }
            char *end = memmem(c->buffer, c->used, "\r\n\r\n", 4);
            if (end == NULL) break;
            size_t head = (size_t)(end - c->buffer) + 4;
            *end = 0;
            if (strncmp(c->buffer, "GET ", 4) == 0) {
                char number[32];
                if (strncmp(c->buffer + 4, "/metrics", 8) == 0) answer(fd, "text/plain", metrics, metrics_size);
                else if (strncmp(c->buffer + 4, "/v1/models", 10) == 0) answer(fd, "application/json", MODELS, sizeof MODELS - 1);
                else if (strncmp(c->buffer + 4, "/version", 8) == 0) answer(fd, "application/json", VERSION, sizeof VERSION - 1);
                else if (strncmp(c->buffer + 4, "/count", 6) == 0)
                    answer(fd, "text/plain", number, (size_t)snprintf(number, sizeof number, "%lu", sent));
                else answer(fd, "application/json", "{}", 2);
            } else {
                char *length = strcasestr(c->buffer, "content-length:");
                c->skip = length ? strtoul(length + 15, NULL, 10) : 0;
                c->streaming = 0;
                c->pending = 1;
            }
            memmove(c->buffer, c->buffer + head, c->used - head);
            c->used -= head;
        }
    }
}

static int listen_on(int port) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), one = 1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (bind(fd, (struct sockaddr *)&address, sizeof address) || listen(fd, 1024)) {
        fprintf(stderr, "engines: cannot listen on port %d: %s\n", port, strerror(errno));
        exit(1);
    }
    return fd;
}

int main(int argc, char **argv) {
    if (argc != 8) { fprintf(stderr, "usage: engines PREFILL N DECODE N CHUNKS TICK_MS METRICS_FILE\n"); return 2; }
    int ports[2] = {atoi(argv[1]), atoi(argv[3])}, counts[2] = {atoi(argv[2]), atoi(argv[4])};
    chunks = atoi(argv[5]);
    tick = atoi(argv[6]);
    ticking = tick > 0;
    FILE *page = fopen(argv[7], "r");
    if (page == NULL) { fprintf(stderr, "engines: cannot read %s\n", argv[7]); return 1; }
    metrics = malloc(1 << 19);
    metrics_size = fread(metrics, 1, 1 << 19, page);
    signal(SIGPIPE, SIG_IGN);
    piece_size = (size_t)snprintf(piece, sizeof piece, "%zx\r\n%s\r\n", sizeof CHUNK - 1, CHUNK);
    burst = malloc(sizeof STREAM_HEAD + piece_size * (size_t)chunks + 128);
    burst_size = (size_t)sprintf(burst, "%s", STREAM_HEAD);
    for (int i = 0; i < chunks; i++) { memcpy(burst + burst_size, piece, piece_size); burst_size += piece_size; }
    burst_size += (size_t)sprintf(burst + burst_size, "%zx\r\n%s\r\n0\r\n\r\n", sizeof LAST - 1, LAST);

    static int listeners[MAX_FD]; /* 1 prefill, 2 decode, 3 timer */
    epoll = epoll_create1(0);
    for (int role = 0; role < 2; role++)
        for (int i = 0; i < counts[role]; i++) {
            int fd = listen_on(ports[role] + i);
            listeners[fd] = role + 1;
            struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
            epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event);
        }
    for (int i = 0; i < PHASES; i++) heads[i] = -1;
    int phase = 0;
    if (ticking) {
        long ns = tick * 1000000L / PHASES;
        struct itimerspec every = {{ns / 1000000000L, ns % 1000000000L}, {ns / 1000000000L, ns % 1000000000L}};
        int fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
        timerfd_settime(fd, 0, &every, NULL);
        listeners[fd] = 3;
        struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
        epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event);
    }
    puts("ready");
    fflush(stdout);
    struct epoll_event events[256];
    for (;;) {
        int n = epoll_wait(epoll, events, 256, -1);
        for (int i = 0; i < n; i++) {
            int fd = events[i].data.fd;
            if (listeners[fd] == 3) {
                uint64_t times;
                if (read(fd, &times, sizeof times) != sizeof times) continue;
                for (; times > 0; times--) step(phase++ % PHASES);
            } else if (listeners[fd]) {
                int made, one = 1;
                while ((made = accept4(fd, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
                    if (made >= MAX_FD) { close(made); continue; }
                    setsockopt(made, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
                    struct connection *c = calloc(1, sizeof *c);
                    c->decode = listeners[fd] == 2;
                    c->buffer = malloc(BUFFER);
                    c->phase = c->next = c->previous = -1;
                    connections[made] = c;
                    struct epoll_event event = {.events = EPOLLIN, .data.fd = made};
                    epoll_ctl(epoll, EPOLL_CTL_ADD, made, &event);
                }
            } else if (connections[fd]) {
                read_from(fd);
            }
        }
    }
}
