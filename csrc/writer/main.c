/*
 * main.c: the executable beside the package that writes background saves (docs/architecture.md).
 *
 * A trainer starts it with its own process id as the one argument, which is there for people who
 * look at a list of processes, and with a socket; all it does is csrc/core/writer_service.c.
 */
#include <stdio.h>

#include "writer_service.h"

int
main(int argc, char **argv)
{
    (void)argv;

    enum dcp_writer_end end = argc == 2 ? dcp_writer_serve() : DCP_WRITER_END_USAGE;
    if (end == DCP_WRITER_END_USAGE) {
        fputs("dcp_writer: a part of dcp_native, which starts it by itself to write background "
              "saves; there is nothing to run by hand\n",
              stderr);
    }
    return (int)end;
}
