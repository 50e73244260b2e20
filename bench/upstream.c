/* A stand-in for the Anthropic Messages streaming API, for benchmarks.
 *
 *     upstream PORT RATE TOKENS [TTFT_MS]
 *
 * Prints the port that it listens on (PORT 0: any free one), on 127.0.0.1 only, and serves until it is killed.
 * Every POST streams TOKENS tokens, one every 1/RATE seconds, the first after TTFT_MS. A token is "~<unix microseconds> "
 * and is born when it is sent, so that whoever reads it knows how long it was under way.
 *
 * The model's name in the request chooses where the stream stays until the peer hangs up:
 *     "no-headers"   the response's headers never come
 *     "slow-first"   headers and message_start come, the first token never does
 *     anything else  tokens come; of "hasty" the first 1,000 at 200 a second
 *
 * GET /stats            {"active", "started", "completed", "aborted", "tokens", "last_abort_us"}
 * GET /aborts?from=N    the streams that the peer hung up on, from the Nth: [{"tag", "at_us", "phase", "tokens"}, ...]
 *                       The tag is the last word "cycle-..." of the request; the phase is "headers", "first" or "middle".
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <ctype.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "clock.h"

#define TAG_SIZE 48
#define MAX_ABORTS 65536
#define MAX_REQUEST (8u << 20)
#define READ_SIZE 65536u
#define NEVER UINT64_MAX
#define HASTY_TOKENS 1000
#define HASTY_PERIOD_US 5000

enum phase { IDLE, HEADERS, FIRST, MIDDLE };
static const char *const phase_names[] = {"idle", "headers", "first", "middle"};

struct connection {
    int fd;
    enum phase phase;
    int slot;              /* its place in `streams`, while phase is not IDLE */
    int sent;              /* tokens of this stream */
    int hasty_tokens;      /* how many of them come faster than the others */
    uint64_t next_us;      /* when its next token is due */
    char tag[TAG_SIZE];
    char *request;         /* what was read of the request so far */
    size_t request_length, request_size;
    char *unsent;          /* what the socket did not take; no token is made meanwhile */
    size_t unsent_length;
};

struct abort_record {
    char tag[TAG_SIZE];
    uint64_t at_us;
    enum phase phase;
    int tokens;
};

static struct {
    uint64_t started, completed, aborted, tokens, last_abort_us;
} stats;

static struct connection **connections; /* by file descriptor */
static struct connection **streams;     /* those that stream, without gaps */
static int connections_size, stream_count, epoll_fd;
static struct abort_record aborts[MAX_ABORTS];
static size_t abort_count;
static uint64_t period_us, first_token_us;
static int tokens_per_stream;

static void watch(struct connection *c, int operation, uint32_t events)
{
    struct epoll_event event = {.events = events, .data.fd = c->fd};
    epoll_ctl(epoll_fd, operation, c->fd, &event);
}

static void stream_begin(struct connection *c, enum phase phase, uint64_t next_us)
{
    c->phase = phase;
    c->next_us = next_us;
    c->sent = 0;
    c->slot = stream_count;
    streams[stream_count++] = c;
}

static void stream_end(struct connection *c)
{
    struct connection *last = streams[--stream_count];
    streams[c->slot] = last;
    last->slot = c->slot;
    c->phase = IDLE;
}

static void record_abort(const struct connection *c)
{
    stats.aborted++;
    stats.last_abort_us = now_us();
    if (abort_count == MAX_ABORTS)
        return;
    struct abort_record *a = &aborts[abort_count++];
    memcpy(a->tag, c->tag, TAG_SIZE);
    a->at_us = stats.last_abort_us;
    a->phase = c->phase;
    a->tokens = c->sent;
}

static void hang_up(struct connection *c)
{
    if (c->phase != IDLE) {
        record_abort(c);
        stream_end(c);
    }
    connections[c->fd] = NULL;
    close(c->fd);
    free(c->request);
    free(c->unsent);
    free(c);
}

static void keep_unsent(struct connection *c, const char *data, size_t length)
{
    char *grown = realloc(c->unsent, c->unsent_length + length);
    if (!grown)
        exit(1);
    memcpy(grown + c->unsent_length, data, length);
    c->unsent = grown;
    c->unsent_length += length;
    watch(c, EPOLL_CTL_MOD, EPOLLIN | EPOLLRDHUP | EPOLLOUT);
}

/* Sends, or keeps what the socket does not take. A broken connection is noticed when it is read. */
static void send_bytes(struct connection *c, const char *data, size_t length)
{
    ssize_t taken = 0;
    if (!c->unsent_length)
        taken = write(c->fd, data, length);
    if (taken < 0 && errno != EAGAIN)
        return;
    if (taken < 0)
        taken = 0;
    if ((size_t)taken < length)
        keep_unsent(c, data + taken, length - (size_t)taken);
}

static void send_more(struct connection *c)
{
    ssize_t taken = write(c->fd, c->unsent, c->unsent_length);
    if (taken <= 0)
        return;
    c->unsent_length -= (size_t)taken;
    memmove(c->unsent, c->unsent + taken, c->unsent_length);
    if (!c->unsent_length)
        watch(c, EPOLL_CTL_MOD, EPOLLIN | EPOLLRDHUP);
}

static void send_chunk(struct connection *c, const char *text)
{
    char chunk[2048];
    int length = snprintf(chunk, sizeof chunk, "%zx\r\n%s\r\n", strlen(text), text);
    send_bytes(c, chunk, (size_t)length);
}

static void send_json(struct connection *c, const char *json, size_t length)
{
    char head[160];
    int n = snprintf(head, sizeof head,
                     "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %zu\r\n\r\n", length);
    send_bytes(c, head, (size_t)n);
    send_bytes(c, json, length);
}

static void send_stats(struct connection *c)
{
    char json[320];
    int n = snprintf(json, sizeof json,
                     "{\"active\":%d,\"started\":%lu,\"completed\":%lu,\"aborted\":%lu,\"tokens\":%lu,"
                     "\"last_abort_us\":%lu}",
                     stream_count, stats.started, stats.completed, stats.aborted, stats.tokens, stats.last_abort_us);
    send_json(c, json, (size_t)n);
}

static void send_aborts(struct connection *c, size_t from)
{
    char *json = NULL;
    size_t length = 0;
    FILE *out = open_memstream(&json, &length);
    fputc('[', out);
    for (size_t i = from; i < abort_count; i++) {
        const struct abort_record *a = &aborts[i];
        fprintf(out, "%s{\"tag\":\"%s\",\"at_us\":%lu,\"phase\":\"%s\",\"tokens\":%d}", i > from ? "," : "", a->tag,
                a->at_us, phase_names[a->phase], a->tokens);
    }
    fputc(']', out);
    fclose(out);
    send_json(c, json, length);
    free(json);
}

static void send_head(struct connection *c)
{
    static const char head[] = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
                               "cache-control: no-cache\r\nrequest-id: req_bench\r\ntransfer-encoding: chunked\r\n\r\n";
    char start[768];
    snprintf(start, sizeof start,
             "event: message_start\ndata: {\"type\":\"message_start\",\"message\":{\"id\":\"msg_%lu\","
             "\"type\":\"message\",\"role\":\"assistant\",\"model\":\"bench\",\"content\":[],\"stop_reason\":null,"
             "\"stop_sequence\":null,\"usage\":{\"input_tokens\":25,\"output_tokens\":1}}}\n\n"
             "event: content_block_start\ndata: {\"type\":\"content_block_start\",\"index\":0,"
             "\"content_block\":{\"type\":\"text\",\"text\":\"\"}}\n\n",
             stats.started);
    send_bytes(c, head, sizeof head - 1);
    send_chunk(c, start);
}

static void send_token(struct connection *c)
{
    char event[192];
    snprintf(event, sizeof event,
             "event: content_block_delta\ndata: {\"type\":\"content_block_delta\",\"index\":0,"
             "\"delta\":{\"type\":\"text_delta\",\"text\":\"~%lu \"}}\n\n",
             now_us());
    send_chunk(c, event);
    c->phase = MIDDLE;
    c->sent++;
    stats.tokens++;
}

static void send_end(struct connection *c)
{
    char end[384];
    snprintf(end, sizeof end,
             "event: content_block_stop\ndata: {\"type\":\"content_block_stop\",\"index\":0}\n\n"
             "event: message_delta\ndata: {\"type\":\"message_delta\",\"delta\":{\"stop_reason\":\"end_turn\","
             "\"stop_sequence\":null},\"usage\":{\"output_tokens\":%d}}\n\n"
             "event: message_stop\ndata: {\"type\":\"message_stop\"}\n\n",
             c->sent);
    send_chunk(c, end);
    send_bytes(c, "0\r\n\r\n", 5);
    stats.completed++;
    stream_end(c);
}

/* Copies the last "cycle-..." of the request, so that a cycle is known by its number whatever surrounds it. */
static void read_tag(struct connection *c, const char *body)
{
    const char *last = NULL;
    for (const char *at = body; (at = strstr(at, "cycle-")); at++)
        last = at;
    size_t n = 0;
    for (; last && n < TAG_SIZE - 1 && (isalnum((unsigned char)last[n]) || last[n] == '-'); n++)
        c->tag[n] = last[n];
    c->tag[n] = 0;
}

static int model_is(const char *body, const char *name)
{
    const char *at = strstr(body, "\"model\"");
    if (!at)
        return 0;
    at += strlen("\"model\"");
    at += strspn(at, ": \"");
    return !strncmp(at, name, strlen(name));
}

static void answer_post(struct connection *c, const char *body)
{
    stats.started++;
    c->hasty_tokens = model_is(body, "hasty") ? HASTY_TOKENS : 0;
    read_tag(c, body);
    if (model_is(body, "no-headers")) {
        stream_begin(c, HEADERS, NEVER);
        return;
    }
    send_head(c);
    if (model_is(body, "slow-first"))
        stream_begin(c, FIRST, NEVER);
    else /* streams that start together don't tick together */
        stream_begin(c, FIRST, now_us() + first_token_us + stats.started * 7919 % period_us);
}

static void answer(struct connection *c, const char *body)
{
    if (!strncmp(c->request, "GET /stats ", 11))
        send_stats(c);
    else if (!strncmp(c->request, "GET /aborts?from=", 17))
        send_aborts(c, strtoul(c->request + 17, NULL, 10));
    else if (!strncmp(c->request, "POST ", 5) && c->phase == IDLE)
        answer_post(c, body);
    else
        send_bytes(c, "HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n", 45);
}

/* Answers the request if it is there whole. Pipelining is not known: one request at a time. */
static void read_request(struct connection *c)
{
    char *end = strstr(c->request, "\r\n\r\n");
    if (!end)
        return;
    const char *length = strcasestr(c->request, "content-length:");
    size_t body_length = length && length < end ? strtoul(length + 15, NULL, 10) : 0;
    if (c->request_length < (size_t)(end + 4 - c->request) + body_length)
        return;
    answer(c, end + 4);
    c->request_length = 0;
}

static void read_connection(struct connection *c)
{
    if (c->request_length + READ_SIZE + 1 > c->request_size) {
        c->request_size = c->request_length + READ_SIZE + 1;
        c->request = realloc(c->request, c->request_size);
        if (!c->request)
            exit(1);
    }
    ssize_t n = read(c->fd, c->request + c->request_length, READ_SIZE);
    if (n < 0 && errno == EAGAIN)
        return;
    if (n <= 0 || c->request_length > MAX_REQUEST) {
        hang_up(c);
        return;
    }
    c->request_length += (size_t)n;
    c->request[c->request_length] = 0;
    read_request(c);
}

static void accept_all(int listener)
{
    int fd, one = 1;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
        struct connection *c = fd < connections_size ? calloc(1, sizeof *c) : NULL;
        if (!c) {
            close(fd);
            continue;
        }
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        c->fd = fd;
        connections[fd] = c;
        watch(c, EPOLL_CTL_ADD, EPOLLIN | EPOLLRDHUP);
    }
}

/* Sends every token that is due. A stream that fell behind catches up, so that the rate holds on average. */
static void send_due(void)
{
    uint64_t now = now_us();
    for (int i = stream_count - 1; i >= 0; i--) { /* backwards: an ended stream is replaced by one already seen */
        struct connection *c = streams[i];
        while (c->phase != IDLE && c->next_us <= now && !c->unsent_length) {
            c->next_us += c->sent < c->hasty_tokens ? HASTY_PERIOD_US : period_us;
            if (c->sent < tokens_per_stream)
                send_token(c);
            else
                send_end(c);
        }
    }
}

static int listen_on(int port)
{
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), one = 1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    struct sockaddr_in address = {
        .sin_family = AF_INET, .sin_port = htons((uint16_t)port), .sin_addr = {htonl(INADDR_LOOPBACK)}};
    socklen_t size = sizeof address;
    if (bind(fd, (struct sockaddr *)&address, size) || listen(fd, 4096)) {
        perror("listen");
        exit(1);
    }
    getsockname(fd, (struct sockaddr *)&address, &size);
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);
    return fd;
}

static void serve(int listener)
{
    static struct epoll_event events[1024];
    struct epoll_event event = {.events = EPOLLIN, .data.fd = listener};
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, listener, &event);
    for (;;) {
        int n = epoll_wait(epoll_fd, events, 1024, stream_count ? 1 : -1);
        for (int i = 0; i < n; i++) {
            int fd = events[i].data.fd;
            if (fd == listener) {
                accept_all(listener);
                continue;
            }
            if (connections[fd] && events[i].events & EPOLLOUT && connections[fd]->unsent_length)
                send_more(connections[fd]);
            if (connections[fd] && events[i].events & ~(uint32_t)EPOLLOUT)
                read_connection(connections[fd]);
        }
        send_due();
    }
}

int main(int argc, char **argv)
{
    double rate = argc > 2 ? atof(argv[2]) : 0;
    tokens_per_stream = argc > 3 ? atoi(argv[3]) : 0;
    first_token_us = argc > 4 ? strtoull(argv[4], NULL, 10) * 1000 : 0;
    if (rate <= 0 || rate > 1e6 || tokens_per_stream <= 0) {
        fprintf(stderr, "usage: upstream PORT RATE TOKENS [TTFT_MS]\n");
        return 2;
    }
    period_us = (uint64_t)(1e6 / rate);
    signal(SIGPIPE, SIG_IGN);
    connections_size = raise_file_limit();
    connections = calloc((size_t)connections_size, sizeof *connections);
    streams = calloc((size_t)connections_size, sizeof *streams);
    epoll_fd = epoll_create1(0);
    if (!connections || !streams || epoll_fd < 0)
        return 1;
    serve(listen_on(atoi(argv[1])));
}
