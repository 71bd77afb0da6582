/*
 * pickle_op.h: the pickle opcodes of protocols 2 to 5, by Python's names for them.
 *
 * Without those that only older protocols, extension registries and out-of-band buffers use.  The
 * writer emits a subset, the machine of pickle_vm.c runs all of these.
 */
#ifndef DCP_PICKLE_OP_H
#define DCP_PICKLE_OP_H

enum dcp_pickle_op {
    DCP_OP_MARK = '(',
    DCP_OP_EMPTY_TUPLE = ')',
    DCP_OP_STOP = '.',
    DCP_OP_POP = '0',
    DCP_OP_POP_MARK = '1',
    DCP_OP_BINBYTES = 'B',
    DCP_OP_SHORT_BINBYTES = 'C',
    DCP_OP_BINFLOAT = 'G',
    DCP_OP_BININT = 'J',
    DCP_OP_BININT1 = 'K',
    DCP_OP_BININT2 = 'M',
    DCP_OP_NONE = 'N',
    DCP_OP_BINPERSID = 'Q',
    DCP_OP_REDUCE = 'R',
    DCP_OP_BINUNICODE = 'X',
    DCP_OP_EMPTY_LIST = ']',
    DCP_OP_APPEND = 'a',
    DCP_OP_BUILD = 'b',
    DCP_OP_GLOBAL = 'c',
    DCP_OP_APPENDS = 'e',
    DCP_OP_BINGET = 'h',
    DCP_OP_LONG_BINGET = 'j',
    DCP_OP_BINPUT = 'q',
    DCP_OP_LONG_BINPUT = 'r',
    DCP_OP_SETITEM = 's',
    DCP_OP_TUPLE = 't',
    DCP_OP_SETITEMS = 'u',
    DCP_OP_EMPTY_DICT = '}',
    DCP_OP_PROTO = 0x80,
    DCP_OP_NEWOBJ = 0x81,
    DCP_OP_TUPLE1 = 0x85,
    DCP_OP_TUPLE2 = 0x86,
    DCP_OP_TUPLE3 = 0x87,
    DCP_OP_NEWTRUE = 0x88,
    DCP_OP_NEWFALSE = 0x89,
    DCP_OP_LONG1 = 0x8A,
    DCP_OP_LONG4 = 0x8B,
    DCP_OP_SHORT_BINUNICODE = 0x8C,
    DCP_OP_BINUNICODE8 = 0x8D,
    DCP_OP_BINBYTES8 = 0x8E,
    DCP_OP_EMPTY_SET = 0x8F,
    DCP_OP_ADDITEMS = 0x90,
    DCP_OP_FROZENSET = 0x91,
    DCP_OP_NEWOBJ_EX = 0x92,
    DCP_OP_STACK_GLOBAL = 0x93,
    DCP_OP_MEMOIZE = 0x94,
    DCP_OP_FRAME = 0x95,
    DCP_OP_BYTEARRAY8 = 0x96,
};

#endif
