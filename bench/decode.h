/* Decodes what one connection receives, wherever TCP cuts it: an HTTP head, then a WebSocket's frames, a chunked body
 * or a plain body. No I/O happens here. */
#ifndef BENCH_DECODE_H
#define BENCH_DECODE_H

#include <stddef.h>
#include <stdint.h>

enum { HEAD_SIZE = 1024, CONTROL_SIZE = 125 };
enum opcode { OP_CONTINUATION = 0, OP_TEXT = 1, OP_BINARY = 2, OP_CLOSE = 8, OP_PING = 9, OP_PONG = 10 };

struct decoder {
    enum { HEAD, PLAIN, CHUNK_SIZE, CHUNK_DATA, CHUNK_END, FRAME_HEAD, FRAME_DATA, BROKEN } state;
    uint64_t left;               /* bytes that the frame or chunk still has */
    unsigned opcode;
    size_t buffered;             /* bytes in buffer: the HTTP head, or a frame's head, or a control frame */
    unsigned char buffer[HEAD_SIZE];
};

/* Who uses a decoder is told what it finds; `owner` is passed through. */
struct events {
    void (*head)(void *owner, int status);                                           /* the HTTP head is complete */
    void (*data)(void *owner, const unsigned char *bytes, size_t n);                 /* payload, in pieces */
    void (*message_end)(void *owner);                                                /* a data frame is complete */
    void (*control)(void *owner, unsigned opcode, const unsigned char *bytes, size_t n);
};

/* Decodes n more bytes. After something that is not the protocol the state is BROKEN, and the rest is ignored. */
void decode(struct decoder *d, const unsigned char *bytes, size_t n, const struct events *events, void *owner);

/* Finds tokens, "~<16 digits><other>", in a text that comes in pieces. */
struct scanner {
    uint64_t value;
    unsigned digits; /* 0: outside of a token; otherwise one more than the digits so far */
};

/* Takes one byte. Returns the number of a token that this byte completes, else 0. */
static inline uint64_t scan(struct scanner *s, unsigned char byte)
{
    if (byte == '~') {
        s->value = 0;
        s->digits = 1;
    } else if (s->digits && byte >= '0' && byte <= '9') {
        s->value = s->value * 10 + (byte - '0');
        s->digits++;
    } else if (s->digits) {
        uint64_t found = s->digits == 17 ? s->value : 0;
        s->digits = 0;
        return found;
    }
    return 0;
}

#endif
