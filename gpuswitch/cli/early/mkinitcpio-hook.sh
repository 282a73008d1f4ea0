# Written by "gpuswitchctl setup boot"; "gpuswitchctl setup boot undo" takes it back. Never run.

run_earlyhook() {
    /usr/lib/gpuswitch/bind.sh
}
