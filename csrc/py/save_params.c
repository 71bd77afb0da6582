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
                            "split_bytes",
                            "sync_files",
                            "broadcast_metadata",
                            "direct",
                            NULL};
    unsigned long long call_hash = 0, plan_salt = 0, split_bytes = DCP_SPLIT_AUTO;
    int is_path = 0, use_collectives = 1, lowest = 0, sync = 1, share = 0;
    int direct = DCP_DIRECT_AUTO;

    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "Os|$zpzzzKKppKppi:Save", names, ret_group,
                                     &params->dir_path, &params->meta.checkpoint_id, &is_path,
                                     &params->meta.storage_save_id, &params->meta.version,
                                     &params->identity, &call_hash, &plan_salt, &use_collectives,
                                     &lowest, &split_bytes, &sync, &share, &direct)) {
        return -1;
    }
    params->io = dcp_io_posix();
    params->meta.checkpoint_id_is_path = is_path != 0;
    params->call_hash = call_hash;
    params->plan_salt = plan_salt;
    params->split_bytes = split_bytes;
    params->independent = use_collectives == 0;
    params->to_lowest_rank = lowest != 0;
    params->sync = sync != 0;
    params->share_metadata = share != 0;
    params->direct = (enum dcp_direct)direct;
    return 0;
}
