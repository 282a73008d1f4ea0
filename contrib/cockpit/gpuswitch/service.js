// gpuswitchd over the system bus, through cockpit-bridge: docs/dbus.md says what it offers.

/* global cockpit */

import { now } from "./clock.js";
import { _ } from "./words.js";

export const NAME = "org.gpuswitch1";
const ROOT = "/org/gpuswitch1";
const MANAGER = `${NAME}.Manager`;
const GPU = `${NAME}.Gpu`;
const OBJECTS = "org.freedesktop.DBus.ObjectManager";
const PROPERTIES = "org.freedesktop.DBus.Properties";
const BUS = "org.freedesktop.DBus";
const BUS_PATH = "/org/freedesktop/DBus";
const GONE = ["ServiceUnknown", "NameHasNoOwner", "NoReply"].map(name => `${BUS}.Error.${name}`);

/** A value without the `{t, v}` that cockpit-bridge puts around what is in a variant. */
export function plain(value) {
    if (Array.isArray(value))
        return value.map(plain);
    if (value === null || typeof value !== "object")
        return value;
    if (typeof value.t === "string" && "v" in value)
        return plain(value.v);
    return Object.fromEntries(Object.entries(value).map(([key, each]) => [key, plain(each)]));
}

/**
 * What is known of the service, kept up to date by its signals.
 *
 * `status`: `connecting`, `ready`, `stopped` (it was there, and is not now; what is known of GPUs is as it was last),
 * `absent` (nothing brings it on this machine, or it does not start; `problem` says why, as the bus or Cockpit does).
 * `gpus`: the properties of each GPU, by the path of its object. `steps`: of each, what is known of its last switch.
 * `changed()` is called after each change, with `finished` true where the history has grown, and with `only`, the path of
 * a GPU, where nothing of any other has changed.
 *
 * All that is asked goes to the unique name that the service has on the bus: a call to its own name would start it, also
 * where somebody has just stopped it. Only `open` starts it.
 */
export class Service {
    constructor(changed) {
        this.status = "connecting";
        this.problem = "";
        this.version = "";
        this.gpus = new Map();
        this.steps = new Map();
        this.changed = changed;
        this.owner = "";
        this.client = null;
        this.bus = cockpit.dbus(BUS, { bus: "system" });
        this.bus.subscribe({ interface: BUS, member: "NameOwnerChanged", arg0: NAME },
                           (_path, _interface, _member, [, , owner]) => this.owned(owner));
        this.watchRights();
        this.open();
    }

    /** Look for it: it is started where the bus can do that. */
    open() {
        this.bus.call(BUS_PATH, BUS, "StartServiceByName", [NAME, 0], { type: "su" })
                .then(() => this.bus.call(BUS_PATH, BUS, "GetNameOwner", [NAME], { type: "s" }))
                .then(([owner]) => this.owned(owner), error => this.owner || this.closed(error.message));
    }

    /** Whoever becomes root in Cockpit, or is no longer, asks as another user from now on. */
    watchRights() {
        const superuser = cockpit.dbus(null, { bus: "internal" }).proxy("cockpit.Superuser", "/superuser");
        let current;
        superuser.addEventListener("changed", () => {
            if (current !== undefined && superuser.Current !== current && this.owner)
                this.connect();
            current = superuser.Current;
        });
    }

    /** This is its unique name now; empty: it is gone. */
    owned(owner) {
        if (owner === this.owner)
            return;
        this.owner = owner;
        this.disconnect();
        if (owner)
            this.connect();
        else if (this.status === "ready")
            this.become("stopped");
        else if (this.status === "connecting")
            this.closed("");
    }

    disconnect() {
        const former = this.client;
        this.client = null;
        former?.close();
    }

    connect() {
        this.disconnect();
        const client = cockpit.dbus(this.owner, { bus: "system", superuser: "try" });
        this.client = client;
        client.addEventListener("owner", (_event, owner) => client === this.client && owner && this.load());
        client.addEventListener("close", (_event, options) => client === this.client && this.closed(options.problem));
        client.subscribe({ path_namespace: ROOT }, (...signal) => client === this.client && this.heard(...signal));
    }

    /** It cannot be talked to; what comes after this is looked at anew. */
    closed(problem) {
        this.owner = "";
        this.disconnect();
        this.problem = problem ?? "";
        this.become("absent");
    }

    become(status) {
        this.status = status;
        this.changed({ finished: false });
    }

    /** Read all anew: a service that has just started knows nothing of what was told before. */
    load() {
        const client = this.client;
        const failed = error => client === this.client && this.closed(error.problem ?? error.message);
        client.call(ROOT, PROPERTIES, "Get", [MANAGER, "Version"], { type: "ss" })
                .then(([version]) => { this.version = plain(version) }, failed);
        // Signals keep their place among the answers: what changes after this one is told after it.
        client.call(ROOT, OBJECTS, "GetManagedObjects", [], { type: "" }).then(([objects]) => {
            if (client !== this.client)
                return;
            this.gpus = new Map(Object.entries(objects).filter(([, each]) => GPU in each)
                    .map(([path, each]) => [path, plain(each[GPU])]));
            this.status = "ready";
            this.changed({ finished: true });
        }, failed);
    }

    heard(path, iface, member, values) {
        let finished = false;
        let only = path;
        if (iface === PROPERTIES && values[0] === GPU && this.gpus.has(path)) {
            const before = this.gpus.get(path);
            const after = { ...before, ...plain(values[1]) };
            this.gpus.set(path, after);
            // Moved by somebody else, it is in the history, too.
            finished = after.State !== before.State;
        } else if (iface === OBJECTS && member === "InterfacesAdded" && GPU in values[1]) {
            this.gpus.set(values[0], plain(values[1][GPU]));
            only = undefined;
        } else if (iface === OBJECTS && member === "InterfacesRemoved" && values[1].includes(GPU)) {
            this.gpus.delete(values[0]);
            only = undefined;
        } else if (iface === GPU && member === "StepChanged") {
            this.step(path, ...values);
        } else if (iface === GPU && member === "SwitchFinished") {
            finished = true;
        } else {
            return;
        }
        this.changed({ finished, only });
    }

    step(path, id, index, count, kind, title, status, seconds) {
        if (this.steps.get(path)?.id !== id)
            this.steps.set(path, { id, count, list: new Map() });
        const { list } = this.steps.get(path);
        list.set(index, { index, title, status, seconds, since: now() });
    }

    // Calls: each gives a promise; an error has a `message`, one sentence or a line for each reason, and the D-Bus `name`.

    ask(path, iface, method, type, ...values) {
        if (this.status !== "ready")
            return Promise.reject(new Error(_("The service gpuswitchd does not run; start it first.")));
        // Cockpit's own promises do not catch what their listeners throw.
        return Promise.resolve(this.client.call(path, iface, method, values, { type, flags: "i" }))
                .then(([answer]) => plain(answer), error => {
                    throw GONE.includes(error.name) ? new Error(_("The service gpuswitchd has stopped before it answered.")) : error;
                });
    }

    move(path, target, options) {
        return this.ask(path, GPU, target === "vfio" ? "ToVfio" : "ToHost", "a{sv}", options);
    }

    /** To vfio, and home by itself so many seconds after it came there. */
    trial(path, seconds, options) {
        return this.ask(path, GPU, "Trial", "da{sv}", seconds, options);
    }

    recover(path) {
        return this.ask(path, GPU, "Recover", "a{sv}", {});
    }

    cancel(path, id) {
        return this.ask(path, GPU, "Cancel", "s", id);
    }

    plan(path, target, options) {
        return this.ask(path, GPU, "Plan", "sa{sv}", target, options);
    }

    blockers(path, target, options) {
        return this.ask(path, GPU, "Blockers", "sa{sv}", target, options);
    }

    holders(path) {
        return this.ask(path, GPU, "Holders", "");
    }

    history(limit) {
        return this.ask(ROOT, MANAGER, "History", "u", limit);
    }

    historyEntry(id) {
        return this.ask(ROOT, MANAGER, "HistoryEntry", "s", id);
    }
}
