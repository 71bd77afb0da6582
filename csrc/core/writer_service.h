/*
 * writer_service.h: private to csrc/writer: the life of a writer process.
 */
#ifndef WRITER_SERVICE_H
#define WRITER_SERVICE_H

/* How a writer process ends, which is its exit status. */
enum dcp_writer_end {
    DCP_WRITER_END_OK = 0,       /* its trainer is done with it, or gone */
    DCP_WRITER_END_USAGE = 2,    /* not started by a trainer */
    DCP_WRITER_END_PROTOCOL = 3, /* its trainer does not speak our protocol */
    DCP_WRITER_END_SYSTEM = 4,   /* out of memory or of threads */
};

/* Serves the socket at DCP_PROCESS_SOCKET until it ends. */
enum dcp_writer_end dcp_writer_serve(void);

#endif
