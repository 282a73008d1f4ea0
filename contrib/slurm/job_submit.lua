-- /etc/slurm/job_submit.lua on the machine with slurmctld; who has one already calls place_gpus and may_become from it.
-- A job that asks for a GPU, and not for gpu_vfio, asks for gpu_host: so Slurm brings GPUs back from vfio for it.
-- A job that asks for gpu_vfio has its node for itself: while slurmctld waits for a change of features, it would give
-- the rest of the node to a job that wants the other feature, and change it again.

local function asks_for_gpus(job)
    for _, field in ipairs({"tres_per_job", "tres_per_node", "tres_per_socket", "tres_per_task"}) do
        if string.find(job[field] or "", "gpu") then
            return true
        end
    end
    return false
end

-- What a job asks for, with gpu_host. It is left as it is where Slurm has no words for both: the prolog brings GPUs back
-- for such a job. node_features/helpers takes no [] and no * beside a feature that it changes, and there is no group in
-- a group (node_features_p_job_valid, _feature_string2list in src/slurmctld/job_scheduler.c).
local function with_host(features)
    if features == "" then
        return "gpu_host"
    end
    if string.find(features, "[%[%]*]") then
        return features
    end
    local outside = string.gsub(features, "%b()", "")
    if string.find(outside, "|", 1, true) then
        -- a|b&c is (a|b)&c for Slurm, until a feature of it can be changed: then it is a|(b&c)
        if outside ~= features or string.find(features, "|.*[&,]") then
            return features
        end
        features = "(" .. features .. ")"
    end
    return "gpu_host&" .. features
end

local function place_gpus(job)
    local features = job.features or ""
    if string.find(features, "gpu_vfio") then
        job.shared = 0
    elseif asks_for_gpus(job) and not string.find(features, "gpu_host") then
        job.features = with_host(features)
    end
end

-- Whether a job in the queue may be changed so. Slurm lets none but operators change `shared` then, and what they set
-- gives the job no node for itself (_update_job in src/slurmctld/job_mgr.c leaves whole_node as it was).
local function may_become(job, record)
    if string.find(job.features or "", "gpu_vfio") and not string.find(record.features or "", "gpu_vfio") then
        slurm.log_user("cannot change a job to gpu_vfio, which has its node for itself: submit it anew with -C gpu_vfio")
        return false
    end
    return true
end

function slurm_job_submit(job, partitions, user)
    place_gpus(job)
    return slurm.SUCCESS
end

function slurm_job_modify(job, record, partitions, user)
    return may_become(job, record) and slurm.SUCCESS or slurm.ERROR
end

return slurm.SUCCESS
