/*
 * save_params.c: the keyword arguments of _native.Save as the core's parameters.
 */
#include "save_params.h"

int
save_params_parse(PyObject *args, PyObject *kwargs, PyObject **ret_group,
                  struct dcp_save_params *params)
{
    static char *names[] = {"group",
                            "path",
                            "checkpoint_id",
                            "checkpoint_id_is_path",
                            "save_id",
                            "version",
                            "identity",
                            "call_hash",
                            "plan_salt",
                            "use_collectives",
                            "dedup_save_to_lowest_rank",
                            "planned_outside",
                            "split_bytes",
                            "sync_files",
                            "broadcast_metadata",
                            "direct",
                            "base",
                            "link_mode",
                            "content_hash",
                            "io_uring",
                            "writer_nice",
                            "writer_io_priority",
                            "write_limit_bytes_s",
                            "mapped_from",
                            "mapped_to",
                            "elsewhere",
                            NULL};
    unsigned long long call_hash = 0, plan_salt = 0, split_bytes = DCP_SPLIT_AUTO;
    unsigned long long limit_bytes_s = 0, mapped_from = 0, mapped_to = 0;
    int is_path = 0, use_collectives = 1, lowest = 0, outside = 0, sync = 1, share = 0;
    int direct = DCP_DIRECT_AUTO, link_mode = DCP_LINK_REFLINK, content_hash = 0;
    int queue = DCP_QUEUE_AUTO, nice = 0, elsewhere = 0;
    unsigned io_priority = 0;

    if (!PyArg_ParseTupleAndKeywords(
            args, kwargs, "Os|$zpzzzKKpppKppizipiiIKKKp:Save", names, ret_group, &params->dir_path,
            &params->meta.checkpoint_id, &is_path, &params->meta.storage_save_id,
            &params->meta.version, &params->identity, &call_hash, &plan_salt, &use_collectives,
            &lowest, &outside, &split_bytes, &sync, &share, &direct, &params->base_path, &link_mode,
            &content_hash, &queue, &nice, &io_priority, &limit_bytes_s, &mapped_from, &mapped_to,
            &elsewhere)) {
        return -1;
    }
    params->io = dcp_io_posix();
    params->meta.checkpoint_id_is_path = is_path != 0;
    params->call_hash = call_hash;
    params->plan_salt = plan_salt;
    params->split_bytes = split_bytes;
    params->independent = use_collectives == 0;
    params->to_lowest_rank = lowest != 0;
    params->planned_outside = outside != 0;
    params->elsewhere = elsewhere != 0;
    params->sync = sync != 0;
    params->share_metadata = share != 0;
    params->direct = (enum dcp_direct)direct;
    params->link_mode = (enum dcp_link_mode)link_mode;
    params->content_hash = content_hash != 0;
    params->mapped_from = (const uint8_t *)(uintptr_t)mapped_from;
    params->mapped_to = (const uint8_t *)(uintptr_t)mapped_to;
    params->tuning = (struct dcp_write_tuning){.queue = (enum dcp_queue_use)queue,
                                               .nice = nice,
                                               .io_priority = io_priority,
                                               .limit_bytes_s = limit_bytes_s};
    return 0;
}
