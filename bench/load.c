/* A load generator: many connections to one server on 127.0.0.1, over WebSocket or plain HTTP (SSE).
 *
 *     load --port P --connections N (--path /PATH [--frame TEXT]... | --request TEXT) [options]
 *
 *     --path PATH        open WebSockets there, and send every --frame as a text frame after the upgrade
 *     --queries FILE     each connection asks for the path with a line of this file behind it, its own
 *     --request TEXT     or send this, a whole raw HTTP request
 *     --ramp R           open at most R connections a second (default: as fast as it goes)
 *     --settle S         seconds from the last connection's being there to the window (default 0)
 *     --window S         seconds for which is counted (default 5)
 *     --patience S       seconds after the last connect until the missing ones are given up (default 20)
 *     --cpu-of PID       a process whose CPU time in the window is told; may be given several times
 *     --last-frame TEXT  after the window, send this on every open WebSocket ...
 *     --last-answer WORD ... and count those that answer with it within 20 s (its first letter occurs once)
 *
 * A token is "~<unix microseconds> ", born at the model: its latency is from there to the read() that brought it here.
 * Only tokens that arrive in the window count. Prints a line "window" when it begins, and in the end one JSON object.
 * Pings are answered. Compression is not offered.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <getopt.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "clock.h"
#include "decode.h"
#include "histogram.h"

#define MAX_FRAMES 16
#define MAX_PROCESSES 64
#define ANSWER_US 20000000u
#define SECONDS(us) ((double)(us) / 1e6)

struct connection {
    enum { UNOPENED, CONNECTING, WAITING, OPEN, CLOSED } state;
    int fd;
    struct decoder decoder;
    struct scanner scanner;
    uint64_t newest_us;  /* the birth of its newest token */
    uint64_t tokens;     /* in the window */
    size_t matched;      /* letters of --last-answer */
    int answered;
};

static struct {
    int port, connections, frame_count, process_count;
    double ramp, settle_s, window_s, patience_s;
    const char *path, *queries, *request, *last_frame, *last_answer;
    const char *frames[MAX_FRAMES];
    int processes[MAX_PROCESSES];
} option = {.window_s = 5, .patience_s = 20};

static struct {
    uint64_t established, refused, closed_early, tokens, frames, bytes, backwards, answered;
    int first_status, first_close_code;
} count;

static struct connection *connections;
static struct histogram latency;
static FILE *queries;
static int epoll_fd, in_window, in_last_phase;
static uint64_t read_us; /* when the read() that is being decoded returned */

static void watch(int index, int operation, uint32_t events)
{
    struct epoll_event event = {.events = events, .data.u32 = (uint32_t)index};
    epoll_ctl(epoll_fd, operation, connections[index].fd, &event);
}

static void end_connection(struct connection *c)
{
    if (c->state == OPEN)
        count.closed_early++;
    else
        count.refused++;
    c->state = CLOSED;
    close(c->fd);
}

static void send_all(struct connection *c, const void *data, size_t length)
{
    if (write(c->fd, data, length) != (ssize_t)length && c->state != CLOSED)
        end_connection(c);
}

/* A client's frames are masked; the mask 0 is a mask, and costs the server what any other does. */
static void send_frame(struct connection *c, unsigned opcode, const void *data, size_t length)
{
    unsigned char frame[65536 + 8] = {0};
    size_t at = 0;
    frame[at++] = 0x80 | (unsigned char)opcode;
    if (length < 126) {
        frame[at++] = 0x80 | (unsigned char)length;
    } else {
        frame[at++] = 0x80 | 126;
        frame[at++] = (unsigned char)(length >> 8);
        frame[at++] = (unsigned char)length;
    }
    at += 4;
    memcpy(frame + at, data, length);
    send_all(c, frame, at + length);
}

static void on_head(void *owner, int status)
{
    struct connection *c = owner;
    if (status != (option.path ? 101 : 200)) {
        if (!count.first_status)
            count.first_status = status;
        end_connection(c);
        return;
    }
    c->state = OPEN;
    count.established++;
    for (int i = 0; i < option.frame_count && c->state == OPEN; i++)
        send_frame(c, OP_TEXT, option.frames[i], strlen(option.frames[i]));
}

static void on_token(struct connection *c, uint64_t born_us)
{
    if (born_us < c->newest_us)
        count.backwards++;
    c->newest_us = born_us;
    if (!in_window)
        return;
    c->tokens++;
    count.tokens++;
    histogram_add(&latency, read_us > born_us ? read_us - born_us : 0);
}

static void look_for_answer(struct connection *c, unsigned char byte)
{
    const char *word = option.last_answer;
    c->matched = (unsigned char)word[c->matched] == byte ? c->matched + 1 : (unsigned char)word[0] == byte;
    if (word[c->matched])
        return;
    c->matched = 0;
    count.answered += !c->answered;
    c->answered = 1;
}

static void on_data(void *owner, const unsigned char *bytes, size_t n)
{
    struct connection *c = owner;
    for (size_t i = 0; i < n; i++) {
        uint64_t born_us = scan(&c->scanner, bytes[i]);
        if (born_us)
            on_token(c, born_us);
        if (in_last_phase)
            look_for_answer(c, bytes[i]);
    }
}

static void on_message_end(void *owner)
{
    (void)owner;
    count.frames += (unsigned)in_window;
}

static void on_control(void *owner, unsigned opcode, const unsigned char *bytes, size_t n)
{
    struct connection *c = owner;
    if (opcode == OP_PING)
        send_frame(c, OP_PONG, bytes, n);
    else if (opcode == OP_CLOSE && !count.first_close_code)
        count.first_close_code = n >= 2 ? bytes[0] << 8 | bytes[1] : 1005;
    if (opcode == OP_CLOSE && c->state != CLOSED)
        end_connection(c);
}

static const struct events handlers = {on_head, on_data, on_message_end, on_control};

static void open_connection(int index)
{
    struct connection *c = &connections[index];
    struct sockaddr_in address = {
        .sin_family = AF_INET, .sin_port = htons((uint16_t)option.port), .sin_addr = {htonl(INADDR_LOOPBACK)}};
    int one = 1;
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    c->state = CONNECTING;
    if (c->fd < 0) {
        count.refused++;
        c->state = CLOSED;
        return;
    }
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (connect(c->fd, (struct sockaddr *)&address, sizeof address) && errno != EINPROGRESS)
        end_connection(c);
    else
        watch(index, EPOLL_CTL_ADD, EPOLLIN | EPOLLOUT);
}

static void send_request(struct connection *c)
{
    char query[512] = "", upgrade[2048];
    if (option.request) {
        send_all(c, option.request, strlen(option.request));
        return;
    }
    if (queries && fgets(query, sizeof query, queries))
        query[strcspn(query, "\n")] = 0;
    int n = snprintf(upgrade, sizeof upgrade,
                     "GET %s%s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nUpgrade: websocket\r\n"
                     "Connection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
                     "Sec-WebSocket-Version: 13\r\n\r\n",
                     option.path, query, option.port);
    send_all(c, upgrade, (size_t)n < sizeof upgrade ? (size_t)n : sizeof upgrade - 1);
}

static void finish_connect(int index)
{
    struct connection *c = &connections[index];
    int error = 0;
    socklen_t size = sizeof error;
    getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &error, &size);
    if (error) {
        end_connection(c);
        return;
    }
    c->state = WAITING;
    watch(index, EPOLL_CTL_MOD, EPOLLIN);
    send_request(c);
}

static void read_connection(struct connection *c)
{
    static unsigned char buffer[1 << 18];
    ssize_t n = read(c->fd, buffer, sizeof buffer);
    read_us = now_us();
    if (n < 0 && errno == EAGAIN)
        return;
    if (n > 0) {
        if (in_window)
            count.bytes += (uint64_t)n;
        decode(&c->decoder, buffer, (size_t)n, &handlers, c);
    }
    if (c->state != CLOSED && (n <= 0 || c->decoder.state == BROKEN))
        end_connection(c);
}

/* Waits for events at most wait_ms, and handles them. */
static void step(int wait_ms)
{
    static struct epoll_event events[1024];
    int n = epoll_wait(epoll_fd, events, 1024, wait_ms);
    for (int i = 0; i < n; i++) {
        int index = (int)events[i].data.u32;
        struct connection *c = &connections[index];
        if (c->state == CONNECTING)
            finish_connect(index);
        else if (c->state != CLOSED)
            read_connection(c);
    }
}

static void step_until(uint64_t end_us)
{
    for (uint64_t now = now_us(); now < end_us; now = now_us())
        step((int)((end_us - now) / 1000 < 50 ? (end_us - now + 999) / 1000 : 50));
}

static int settled(void)
{
    return count.established + count.refused >= (uint64_t)option.connections;
}

static void connect_all(void)
{
    uint64_t start = now_us();
    for (int opened = 0; opened < option.connections;) {
        double due = option.ramp > 0 ? SECONDS(now_us() - start) * option.ramp : option.connections;
        for (int burst = 0; burst < 64 && opened < option.connections && opened < due; burst++)
            open_connection(opened++);
        step(1);
    }
    uint64_t given_up = now_us() + (uint64_t)(option.patience_s * 1e6);
    while (!settled() && now_us() < given_up)
        step(10);
}

/* User and system time of a process, in seconds; 0 if it is gone. */
static double cpu_time_s(int pid)
{
    char path[64], text[1024] = "";
    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    FILE *file = fopen(path, "r");
    if (!file)
        return 0;
    size_t n = fread(text, 1, sizeof text - 1, file);
    fclose(file);
    text[n] = 0;
    unsigned long user = 0, system = 0;
    char *rest = strrchr(text, ')'); /* the name before it may hold anything */
    if (!rest || sscanf(rest, ") %*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %lu %lu", &user, &system) != 2)
        return 0;
    return (double)(user + system) / (double)sysconf(_SC_CLK_TCK);
}

static void run_last_phase(void)
{
    in_last_phase = 1;
    for (int i = 0; i < option.connections; i++)
        if (connections[i].state == OPEN)
            send_frame(&connections[i], OP_TEXT, option.last_frame, strlen(option.last_frame));
    uint64_t end = now_us() + ANSWER_US;
    while (now_us() < end && count.answered < count.established - count.closed_early)
        step(10);
}

static void report(double window_s, const double *cpu_s, double own_cpu_s)
{
    uint64_t active = 0, slowest = UINT64_MAX, fastest = 0;
    for (int i = 0; i < option.connections; i++) {
        uint64_t tokens = connections[i].tokens;
        active += tokens > 0;
        slowest = tokens < slowest ? tokens : slowest;
        fastest = tokens > fastest ? tokens : fastest;
    }
    printf("{\"connections\":%d,\"established\":%lu,\"refused\":%lu,\"closed_early\":%lu,\"active\":%lu,",
           option.connections, count.established, (uint64_t)option.connections - count.established,
           count.closed_early, active);
    printf("\"first_status\":%d,\"first_close_code\":%d,\"window_s\":%.3f,\"tokens\":%lu,\"frames\":%lu,\"bytes\":%lu,",
           count.first_status, count.first_close_code, window_s, count.tokens, count.frames, count.bytes);
    printf("\"own_cpu_s\":%.2f,", own_cpu_s);
    printf("\"slowest_tokens\":%lu,\"fastest_tokens\":%lu,\"backwards\":%lu,\"answered\":%lu,", slowest, fastest,
           count.backwards, count.answered);
    printf("\"p50_ms\":%.3f,\"p90_ms\":%.3f,\"p99_ms\":%.3f,\"max_ms\":%.3f,\"cpu_s\":[",
           (double)histogram_percentile(&latency, 0.5) / 1e3, (double)histogram_percentile(&latency, 0.9) / 1e3,
           (double)histogram_percentile(&latency, 0.99) / 1e3, (double)latency.max / 1e3);
    for (int i = 0; i < option.process_count; i++)
        printf("%s%.2f", i ? "," : "", cpu_s[i]);
    printf("]}\n");
}

static void read_options(int argc, char **argv)
{
    static const struct option known[] = {
        {"port", 1, 0, 'p'},    {"connections", 1, 0, 'n'}, {"path", 1, 0, 'w'},     {"request", 1, 0, 'r'},
        {"frame", 1, 0, 'f'},   {"ramp", 1, 0, 'm'},        {"settle", 1, 0, 's'},   {"window", 1, 0, 't'},
        {"patience", 1, 0, 'q'}, {"cpu-of", 1, 0, 'c'}, {"queries", 1, 0, 'u'},     {"last-frame", 1, 0, 'l'}, {"last-answer", 1, 0, 'a'},
        {0, 0, 0, 0}};
    for (int name; (name = getopt_long(argc, argv, "", known, NULL)) != -1;) {
        switch (name) {
        case 'p': option.port = atoi(optarg); break;
        case 'n': option.connections = atoi(optarg); break;
        case 'w': option.path = optarg; break;
        case 'u': option.queries = optarg; break;
        case 'r': option.request = optarg; break;
        case 'm': option.ramp = atof(optarg); break;
        case 's': option.settle_s = atof(optarg); break;
        case 't': option.window_s = atof(optarg); break;
        case 'q': option.patience_s = atof(optarg); break;
        case 'l': option.last_frame = optarg; break;
        case 'a': option.last_answer = optarg; break;
        case 'f':
            if (option.frame_count < MAX_FRAMES && strlen(optarg) < 65536)
                option.frames[option.frame_count++] = optarg;
            break;
        case 'c':
            if (option.process_count < MAX_PROCESSES)
                option.processes[option.process_count++] = atoi(optarg);
            break;
        default: exit(2);
        }
    }
    int one_kind = !option.path != !option.request;
    if (!option.port || option.connections <= 0 || !one_kind || !option.last_frame != !option.last_answer) {
        fprintf(stderr, "usage: load --port P --connections N (--path PATH [--frame TEXT]... | --request TEXT) ...\n");
        exit(2);
    }
}

int main(int argc, char **argv)
{
    read_options(argc, argv);
    queries = option.queries ? fopen(option.queries, "r") : NULL;
    signal(SIGPIPE, SIG_IGN);
    raise_file_limit();
    connections = calloc((size_t)option.connections, sizeof *connections);
    epoll_fd = epoll_create1(0);
    if (!connections || epoll_fd < 0 || !option.queries != !queries)
        return 1;
    connect_all();
    step_until(now_us() + (uint64_t)(option.settle_s * 1e6));

    double cpu_s[MAX_PROCESSES];
    printf("window\n");
    fflush(stdout);
    for (int i = 0; i < option.process_count; i++)
        cpu_s[i] = cpu_time_s(option.processes[i]);
    double own_cpu_s = cpu_time_s(getpid());
    uint64_t start = now_us();
    in_window = 1;
    step_until(start + (uint64_t)(option.window_s * 1e6));
    in_window = 0;
    double window_s = SECONDS(now_us() - start);
    own_cpu_s = cpu_time_s(getpid()) - own_cpu_s;
    for (int i = 0; i < option.process_count; i++)
        cpu_s[i] = cpu_time_s(option.processes[i]) - cpu_s[i];

    if (option.last_frame)
        run_last_phase();
    report(window_s, cpu_s, own_cpu_s);
}
