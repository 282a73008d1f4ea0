-- /etc/slurm/job_submit.lua on the machine with slurmctld; who has one already puts the function into it.
-- A job that asks for a GPU, and not for gpu_vfio, asks for gpu_host: so Slurm brings GPUs back from vfio for it.

local function wants_host(job)
    for _, field in ipairs({"tres_per_job", "tres_per_node", "tres_per_socket", "tres_per_task"}) do
        if string.find(job[field] or "", "gres[/:]gpu") then
            local features = job.features or ""
            return not (string.find(features, "gpu_host") or string.find(features, "gpu_vfio"))
        end
    end
    return false
end

function slurm_job_submit(job, partitions, user)
    if wants_host(job) then
        if job.features == nil or job.features == "" then
            job.features = "gpu_host"
        else
            job.features = "(" .. job.features .. ")&gpu_host"
        end
    end
    return slurm.SUCCESS
end

function slurm_job_modify(job, record, partitions, user)
    return slurm.SUCCESS
end

return slurm.SUCCESS
