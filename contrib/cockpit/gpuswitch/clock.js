// The time as the machine has it, which may be another than the browser's.

/* global cockpit */

/** Seconds that the machine is ahead of the browser. */
let ahead = 0;

/** Seconds since the epoch, on the machine. */
export function now() {
    return Date.now() / 1000 + ahead;
}

/** Look at the machine's clock; gives when it was started, in seconds since the epoch: proc_stat(5), proc_uptime(5). */
export async function readClock() {
    const text = await cockpit.spawn(["cat", "/proc/stat", "/proc/uptime"]);
    const booted = Number(text.match(/^btime ([0-9]+)$/m)[1]);
    const [, up] = text.match(/^([0-9.]+) [0-9.]+$/m);
    ahead = booted + Number(up) - Date.now() / 1000;
    return booted;
}
