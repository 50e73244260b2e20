#define _GNU_SOURCE
#include "decode.h"

#include <stdlib.h>
#include <string.h>

/* Adds one byte to the buffer. Returns 0 when it is full. */
static int keep(struct decoder *d, unsigned char byte)
{
    if (d->buffered == HEAD_SIZE - 1)
        return 0;
    d->buffer[d->buffered++] = byte;
    d->buffer[d->buffered] = 0;
    return 1;
}

static void begin(struct decoder *d, int state)
{
    d->state = state;
    d->buffered = 0;
    d->left = 0;
}

static size_t read_head(struct decoder *d, const unsigned char *bytes, size_t n, const struct events *events, void *owner)
{
    size_t used = 0;
    while (used < n) {
        if (!keep(d, bytes[used++])) {
            begin(d, BROKEN);
            break;
        }
        if (d->buffered < 4 || memcmp(d->buffer + d->buffered - 4, "\r\n\r\n", 4))
            continue;
        const char *head = (const char *)d->buffer;
        int status = d->buffered > 12 ? atoi(head + 9) : 0;
        int chunked = strcasestr(head, "\r\ntransfer-encoding: chunked") != NULL;
        begin(d, status == 101 ? FRAME_HEAD : chunked ? CHUNK_SIZE : PLAIN);
        events->head(owner, status);
        break;
    }
    return used;
}

static size_t read_chunk_size(struct decoder *d, const unsigned char *bytes, size_t n)
{
    size_t used = 0;
    while (used < n) {
        unsigned char byte = bytes[used++];
        if (byte == '\n') {
            d->left = strtoull((const char *)d->buffer, NULL, 16);
            d->buffered = 0;
            d->state = d->left ? CHUNK_DATA : BROKEN; /* the last chunk: nothing that counts comes after it */
            break;
        }
        if (!keep(d, byte)) {
            begin(d, BROKEN);
            break;
        }
    }
    return used;
}

/* The length of the frame's head whose first bytes are buffered, so far as they tell it. A server does not mask. */
static size_t frame_head_length(const struct decoder *d)
{
    if (d->buffered < 2)
        return 2;
    unsigned length = d->buffer[1] & 127;
    return length == 126 ? 4 : length == 127 ? 10 : 2;
}

static size_t read_frame_head(struct decoder *d, const unsigned char *bytes, size_t n)
{
    size_t used = 0;
    while (used < n && d->buffered < frame_head_length(d))
        keep(d, bytes[used++]);
    size_t length = frame_head_length(d);
    if (d->buffered < length)
        return used;
    d->opcode = d->buffer[0] & 15;
    d->left = length == 2 ? d->buffer[1] & 127u : 0;
    for (size_t i = 2; i < length; i++)
        d->left = d->left << 8 | d->buffer[i];
    d->buffered = 0;
    d->state = d->opcode >= OP_CLOSE && d->left > CONTROL_SIZE ? BROKEN : FRAME_DATA;
    return used;
}

static void end_frame(struct decoder *d, const struct events *events, void *owner)
{
    if (d->opcode < OP_CLOSE)
        events->message_end(owner);
    else
        events->control(owner, d->opcode, d->buffer, d->buffered);
    begin(d, FRAME_HEAD);
}

static size_t read_data(struct decoder *d, const unsigned char *bytes, size_t n, const struct events *events, void *owner)
{
    size_t used = n < d->left ? n : (size_t)d->left;
    if (d->state == FRAME_DATA && d->opcode >= OP_CLOSE)
        for (size_t i = 0; i < used; i++)
            keep(d, bytes[i]);
    else
        events->data(owner, bytes, used);
    d->left -= used;
    return used;
}

void decode(struct decoder *d, const unsigned char *bytes, size_t n, const struct events *events, void *owner)
{
    size_t at = 0;
    /* An empty frame ends without a further byte. */
    while (d->state != BROKEN && (at < n || (d->state == FRAME_DATA && !d->left))) {
        switch (d->state) {
        case HEAD:
            at += read_head(d, bytes + at, n - at, events, owner);
            break;
        case PLAIN:
            events->data(owner, bytes + at, n - at);
            at = n;
            break;
        case CHUNK_SIZE:
            at += read_chunk_size(d, bytes + at, n - at);
            break;
        case CHUNK_DATA:
            at += read_data(d, bytes + at, n - at, events, owner);
            if (!d->left) {
                d->state = CHUNK_END;
                events->message_end(owner);
            }
            break;
        case CHUNK_END:
            if (bytes[at++] == '\n')
                begin(d, CHUNK_SIZE);
            break;
        case FRAME_HEAD:
            at += read_frame_head(d, bytes + at, n - at);
            break;
        case FRAME_DATA:
            at += read_data(d, bytes + at, n - at, events, owner);
            if (!d->left)
                end_frame(d, events, owner);
            break;
        case BROKEN:
            break;
        }
    }
}
