/*
 * dcp_limits.h: every limit, with its unit and its reason.
 */
#ifndef DCP_LIMITS_H
#define DCP_LIMITS_H

/* torch allows any number; 64 dimensions is what the pickled sizes of every known model fit into
 * many times over. */
#define DCP_MAX_DIMS 64
/* Ranks of one group.  Ten times the largest jobs; keeps rank * bytes products far from overflow.
 */
#define DCP_MAX_RANKS (1 << 17)
/* Items of one rank's plan.  Indices are 32 bits. */
#define DCP_MAX_ITEMS_PER_RANK (1u << 26)
/* Items of all ranks' plans together.  Twice what a metadata file of DCP_MAX_METADATA_BYTES can
 * list, for replicas that are dropped; group numbers are 32 bits. */
#define DCP_MAX_GLOBAL_ITEMS (1u << 28)
/* Bytes of one fully qualified name, and components of one path. */
#define DCP_MAX_FQN_BYTES (1u << 20)
#define DCP_MAX_PATH_PARTS 4096
/* Nesting of containers in a state dict and of values in a pickle: deeper ones are refused, not
 * recursed into. */
#define DCP_MAX_DEPTH 256
/* The header of a safetensors file, which its format limits; and nesting of values in it that
 * nobody asked for: the format needs 2, other readers stop here as well. */
#define DCP_MAX_SAFETENSORS_HEADER_BYTES 100000000u
#define DCP_MAX_JSON_DEPTH 128
/* A `.metadata` file.  1M chunks take 70 MB; 8 GiB leaves room and still bounds a hostile length.
 */
#define DCP_MAX_METADATA_BYTES (1ull << 33)
/* Other saves whose data files one checkpoint links (`base=`).  A chain of incremental saves keeps
 * a handful alive; 65,536 ids are 1 MiB of a metadata file. */
#define DCP_MAX_ACCEPTED_SAVES (1u << 16)
/* One tensor's payload: 2^56 bytes, so that sums of payloads and headers cannot overflow 64 bits.
 */
#define DCP_MAX_PAYLOAD_BYTES (1ull << 56)
/* One object's record. */
#define DCP_MAX_OBJECT_BYTES (1ull << 40)
/* One data file.  Offsets are signed 64-bit numbers for the kernel; a quarter of their range leaves
 * room for one more payload before a sum is checked. */
#define DCP_MAX_FILE_BYTES (1ull << 62)
/* Files that one rank may write in one save. */
#define DCP_MAX_FILES_PER_RANK (1u << 26)
/* Payloads above this get block checksums: one CRC32 for every block. */
#define DCP_BLOCK_BYTES (1u << 20)
/* Payloads from here on start on this multiple of the file, so that they can be read straight into
 * a page. */
#define DCP_LARGE_PAYLOAD_BYTES (1u << 20)
#define DCP_LARGE_ALIGN_BYTES 4096u
/* Payloads from here on start on the device's usual direct I/O alignment. */
#define DCP_MEDIUM_PAYLOAD_BYTES (1u << 16)
#define DCP_MEDIUM_ALIGN_BYTES 512u
/* The writer's ring: buffers of 8 MiB reach the device's rate; 4 of them are 32 MiB, half of the 64
 * MiB budget. */
#define DCP_RING_BUFFER_BYTES (8u << 20)
#define DCP_RING_BUFFERS 4
/* Most bytes that are handed over at once to a target that only torch can write: large enough that
 * the call costs a tenth of the copy, small enough for the cache. */
#define DCP_PIECE_BYTES (1u << 20)
/* Direct I/O needs buffers, offsets and lengths on this multiple where the file system does not say
 * better. */
#define DCP_DIRECT_ALIGN_BYTES 4096u
/* One request to the kernel: it cuts longer ones at 0x7ffff000 bytes. */
#define DCP_MAX_REQUEST_BYTES (1u << 30)
/* Buffered fallback: dirty bytes before they are pushed out and dropped from the page cache. */
#define DCP_MAX_DIRTY_BYTES (64u << 20)
/* Replicas from here on are assigned before all others, largest first: smaller ones balance in
 * torch's order too, and keep its order of keys. */
#define DCP_BALANCE_BYTES (8u << 20)
/* Replicated tensors from here on may be divided by rows over their holders: smaller ones balance
 * well enough whole, and every part costs a chunk of metadata. */
#define DCP_SPLIT_BYTES (64u << 20)
/* Smallest part of a divided tensor: one buffer of the writer's ring. */
#define DCP_SPLIT_PART_BYTES (8u << 20)
/* Serialised exception of one rank in a failure exchange. */
#define DCP_MAX_FAILURE_BYTES (64u << 10)
/* Files of two requests or more are preallocated: a full disk is met before the data, and writes
 * inside of an allocated file run beside each other where those that extend it wait in line. */
#define DCP_PREALLOCATE_BYTES (16u << 20)
/* A rank that writes this many bytes or more in a few files allocates all of them before the first
 * byte; in more files, one at a time: descriptors are scarce. */
#define DCP_AHEAD_BYTES (64u << 20)
#define DCP_AHEAD_FILES 16
/* Longest sleep of a writer that is limited, in ns: how late it can notice that it is cancelled. */
#define DCP_LIMIT_SLICE_NS 100000000u
/* Writes in flight: one look at `cancel` per slice; after a cancelled or failed save they get the
 * grace, in ns, to end, before their memory is given up for lost. */
#define DCP_QUEUE_SLICE_NS 100000000u
#define DCP_QUEUE_GRACE_NS 60000000000u
/* Arenas that a process keeps: two saves in flight, and one each of private and shared memory. */
#define DCP_MAX_ARENAS 4
/* Address space that an arena reserves, in multiples of its first size: weights are saved before
 * their optimizer has a state, which is a few times as large. */
#define DCP_ARENA_ROOM 8
/* Of the memory that the machine can spare an arena takes at most this many percent. */
#define DCP_ARENA_SPARE_PERCENT 80
/* Of a directory's path that a writer process is told, for its messages: PATH_MAX; longer ones are
 * cut. */
#define DCP_MAX_WRITER_PATH_BYTES 4096
/* Most of a message that is read from a writer process's socket at once: a length that lies takes
 * no more memory than what comes with it. */
#define DCP_WRITER_STEP_BYTES (1u << 20)
/* A writer process says hello in milliseconds; its executable may lie on a slow shared file system.
 */
#define DCP_WRITER_START_NS 30000000000u
/* How often a writer process tells its progress, and the longest wait of either side before it
 * looks at whether it should stop. */
#define DCP_WRITER_SLICE_NS 100000000u
/* Slices without a word from a writer process that writes, after which it counts as lost: 60 s.
 * Slices and not a clock: time in which the trainer itself is stopped does not count. */
#define DCP_WRITER_SILENT_SLICES 600
/* Slices after a cancel: 10 s, for a request that is stuck in a device; then it is killed. */
#define DCP_WRITER_CANCEL_SLICES 100
/* A writer process that is told to end, and one that was killed, get this long. */
#define DCP_WRITER_END_NS 2000000000u
/* How long an idle writer process keeps an arena mapped: mapping it anew costs as much as a write's
 * system calls do, but pages that the trainer gave up stay taken as long as they are mapped. */
#define DCP_WRITER_KEEP_NS 30000000000u
/* The same for an arena that was mapped ahead and not written from yet: 10 minutes, for the first
 * save of a job. */
#define DCP_WRITER_KEEP_PREPARED_NS 600000000000u
/* A writer process whose trainer died waits this long for the files of other ranks, from when its
 * own are durable, before it gives the save up: 5 minutes, for disks that differ. */
#define DCP_WRITER_ORPHAN_NS 300000000000u
/* How late an idle writer process may notice a trainer that died and left its socket to a child. */
#define DCP_WRITER_IDLE_SLICE_NS 1000000000u

/* Dims of a strided box on a device once those that are one run are merged; a kernel's argument
 * holds them.  Boxes of more are copied another way. */
#define DCP_DEVICE_DIMS 8
/* Most between two rows of one copy: what CUDA's devices have as their largest pitch. */
#define DCP_DEVICE_PITCH_BYTES INT32_MAX
/* Device memory in which kernels pack many payloads for one copy to the host: 16 MiB keep a bus of
 * 50 GB/s busy for 30 times as long as it takes to start a kernel and a copy. */
#define DCP_DEVICE_SLAB_BYTES (16u << 20)
/* An event of the device for so many bytes that are staged, and no copy is longer: one this long
 * takes the bus 300 microseconds, and the host as long for the checksum. */
#define DCP_DEVICE_LANDING_BYTES (8u << 20)
/* A copy waits for all that the trainer had put on its streams: whole steps, but not this long. */
#define DCP_DEVICE_TIMEOUT_NS 600000000000u
/* Copies of a save or load that failed get this long to end before their memory is given up. */
#define DCP_DEVICE_GRACE_NS 60000000000u

/* What messages over NCCL pass through on their way, on the device and pinned on the host. */
#define DCP_NCCL_SCRATCH_BYTES (8u << 20)
/* Of that, what a round takes: of all ranks together where it is a gather. */
#define DCP_NCCL_ROUND_BYTES (1u << 20)
/* A group's first call has this time at most to connect, and to move its bytes: all ranks have just
 * agreed to make it, and thousands of them take some seconds. */
#define DCP_NCCL_CONNECT_NS 60000000000u
/* A communicator that is given up gets this long to end, before it is left to its fate. */
#define DCP_NCCL_GRACE_NS 10000000000u

/* The agreement of a background save, in ns.  Looks at the store begin with the first pause, which
 * doubles: at most to the coordinator's, and for the others to a share of the store's time for each
 * rank, within bounds, so that a store of one thread answers 10,000 ranks and hears 2,500 calls a
 * second. */
#define DCP_STORE_FIRST_PAUSE_NS 1000000u
#define DCP_STORE_COORDINATOR_PAUSE_NS 100000000u
#define DCP_STORE_PAUSE_PER_RANK_NS 400000u
#define DCP_STORE_LEAST_PAUSE_NS 100000000u
#define DCP_STORE_MOST_PAUSE_NS 2000000000u
/* Between two looks at the processes of one's host, and how many of them each one looks at: all of
 * a machine with 8 accelerators. */
#define DCP_PEER_LOOK_NS 100000000u
#define DCP_WATCHED_PEERS 8
/* Between two beats of a host. */
#define DCP_HOST_BEAT_NS 2000000000u
/* A host that said that it publishes cannot beat meanwhile: it has this many times the timeout. */
#define DCP_HOST_BUSY_TIMES 6
/* The coordinator gives up this much before the deadline, or an eighth of the time if that is less,
 * so that the others hear of it before theirs. */
#define DCP_VERDICT_MARGIN_NS 5000000000u
/* Whoever gave the verdict waits so long for the others to have read it. */
#define DCP_FAREWELL_NS 30000000000u

#endif
