-- /etc/slurm/job_submit.lua on the machine with slurmctld; who has one already calls place_gpus from it.
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

local function place_gpus(job)
    local features = job.features or ""
    if string.find(features, "gpu_vfio") then
        job.shared = 0
    elseif asks_for_gpus(job) and not string.find(features, "gpu_host") then
        job.features = features == "" and "gpu_host" or "(" .. features .. ")&gpu_host"
    end
end

function slurm_job_submit(job, partitions, user)
    place_gpus(job)
    return slurm.SUCCESS
end

function slurm_job_modify(job, record, partitions, user)
    return slurm.SUCCESS
end

return slurm.SUCCESS
