// Values of the service in words, for people.

/* global cockpit */

export const _ = cockpit.gettext;
export const format = cockpit.format;

/** Seconds as people say them. */
export function duration(seconds) {
    if (seconds < 10)
        return format(_("$0 s"), Number.isInteger(seconds) ? seconds : seconds.toFixed(1));
    if (seconds < 120)
        return format(_("$0 s"), Math.round(seconds));
    if (seconds < 7200)
        return format(_("$0 min"), Math.round(seconds / 60));
    return format(_("$0 h"), Math.round(seconds / 3600));
}

/** A point in time, in seconds since the epoch, in the language of Cockpit. */
export function moment(seconds) {
    return new Intl.DateTimeFormat(cockpit.language.replace("_", "-"), { dateStyle: "medium", timeStyle: "medium" })
            .format(seconds * 1000);
}

/** How a person calls a GPU. */
export function nameOf(gpu) {
    return gpu.Name || gpu.Model || gpu.Address;
}

const STATES = {
    host: [_("on the host"), "green"],
    vfio: [_("on vfio"), "blue"],
    detaching: [_("leaving the host"), "orange"],
    reattaching: [_("coming home"), "orange"],
    recovering: [_("recovering"), "orange"],
    failed: [_("failed"), "red"],
    wedged: [_("wedged"), "red"],
    unknown: [_("unknown"), "grey"],
    absent: [_("absent"), "grey"],
};

/** A state of docs/states.md in words, and its colour. One that this page does not know is said as it is. */
export function stateOf(word) {
    return STATES[word] ?? [word, "grey"];
}

const STATUSES = {
    running: _("running"),
    done: _("done"),
    failed: _("failed"),
    cancelled: _("cancelled"),
    reverting: _("taking back"),
    reverted: _("taken back"),
    "revert-failed": _("not taken back"),
    interrupted: _("interrupted"),
};

export function statusOf(word) {
    return STATUSES[word] ?? word;
}

const RESULTS = {
    done: [_("done"), "green"],
    reverted: [_("reverted"), "orange"],
    cancelled: [_("cancelled"), "grey"],
    failed: [_("failed"), "red"],
    wedged: [_("wedged"), "red"],
    drifted: [_("moved by somebody else"), "orange"],
};

export function resultOf(word) {
    return RESULTS[word] ?? [word, "grey"];
}

/** Who asked for a switch. */
export function askerOf(asker) {
    if (asker.somebody_else)
        return _("somebody else");
    if (asker.trial)
        return _("the end of a trial");
    if (asker.at_boot)
        return _("the start of the machine");
    if (asker.service)
        return _("the service itself");
    if (asker.vm)
        return format(_("virtual machine $0"), asker.vm);
    return asker.unit ? `${asker.command} (${asker.unit})` : asker.command;
}
