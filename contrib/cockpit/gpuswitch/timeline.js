// Where a GPU was, as far as the service and its history tell.

const RESTS = { host: "host", detaching: "host", vfio: "vfio", reattaching: "vfio", failed: "failed", wedged: "failed" };

const MOVING = ["detaching", "reattaching"];

/**
 * The parts of the time from `begin` to `now` in which it is known where a GPU was: `{ start, end, word }`, oldest first,
 * in seconds since the epoch; `word` is host, vfio or failed. `history` has its entries, newest first.
 *
 * What is known: where a switch found it and where it left it, and where it is since when. The service may have been away
 * between two of these, and the machine off: that time is a part where they agree, else nothing. Where the first switch
 * found it, it was since the machine was started, at `booted`: what else had moved it would be in the history.
 */
export function timeline(gpu, history, { begin, booted, now }) {
    const parts = [];
    const add = (start, end, word) => {
        const last = parts.at(-1);
        if (last?.word === word && last.end === start)
            last.end = Math.max(start, end);
        else if (word && end >= Math.max(start, begin))
            parts.push({ start: Math.max(start, begin), end, word });
    };
    let [from, left] = [begin, null];
    for (const each of [...history].reverse()) {
        const came = before(each, left ?? "");
        if (left === null)
            add(Math.max(begin, booted), each.started, came);
        else
            add(from, each.started, left === came ? came : "");
        add(each.started, each.finished, came);
        [from, left] = [each.finished, after(each, came)];
    }
    const rest = restOf(gpu.State);
    const since = Math.max(from, gpu.StateSince);
    // What has failed or is stuck is so until it recovers, and a recovery is no entry before its end, or none at all.
    if (left === null && MOVING.includes(gpu.State))
        add(Math.max(begin, booted), since, rest);
    else
        add(from, since, left === rest || left === "failed" || gpu.State === "recovering" ? left : "");
    add(since, Math.max(since, now), rest);
    return parts;
}

/** The part that a state belongs to: on its way it is where it comes from. */
function restOf(state) {
    return RESTS[state] ?? "";
}

/**
 * Where a GPU was when this entry of the history began; `left` is where the one before it left it, "" where that is not
 * known. What has failed is recovered, which says no other target than a way home does.
 */
function before({ target, result }, left) {
    if (result === "drifted" || left === "failed")
        return left;
    return target === "vfio" ? "host" : "vfio";
}

/** The same for its end. What is reverted is in a known-good state, and not in the one that was asked for: docs/dbus.md. */
function after({ target, result }, came) {
    switch (result) {
    case "done":
    case "drifted":
        return restOf(target);
    case "failed":
    case "wedged":
        return "failed";
    case "reverted":
        return target === "vfio" ? "host" : "vfio";
    }
    return came;
}
