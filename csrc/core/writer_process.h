/*
 * writer_process.h: private: what the two halves of the trainer's side share: the handle
 * (writer_process.c), and what it is told to do (writer_process_write.c).
 */
#ifndef DCP_CORE_WRITER_PROCESS_H
#define DCP_CORE_WRITER_PROCESS_H

#include "dcp_writer_process.h"
#include "writer_message.h"

struct dcp_writer_process {
    struct dcp_writer_channel channel;
    int64_t pid;
    int64_t owner;  /* the process that started it */
    bool surviving; /* it would go on with the last save without us */
    bool lost;      /* it died, or cannot be understood */
    bool reaped;
    enum dcp_process_state state; /* when reaped */
    int detail;
};

/* Nothing that it may still say is of interest. */
void dcp_writer_process_lose(struct dcp_writer_process *process);
/* True when it has ended. */
bool dcp_writer_process_wait_for_end(struct dcp_writer_process *process, uint64_t timeout_ns);
void dcp_writer_process_describe_end(const struct dcp_writer_process *process, char *ret_text,
                                     size_t size);
/* CANCEL and SETTLED. */
int dcp_writer_process_tell(struct dcp_writer_process *process,
                            enum dcp_writer_kind kind) DCP_MUST_CHECK;

#endif
