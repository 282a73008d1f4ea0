// What is asked before a GPU is moved: the plan, what is in the way, and what it ends, as `gpuswitchctl` says it.

import { alert, fill, h, label } from "./elements.js";
import { Dialog } from "./dialog.js";
import { recognized, sentence, stepTitle } from "./sentences.js";
import { _, duration, format, nameOf } from "./words.js";

const DESKTOPS = ["display-manager", "gdm", "gdm3", "greetd", "lightdm", "lxdm", "ly", "plasmalogin", "sddm", "xdm"]
        .map(name => `${name}.service`);

const WAIT_SECONDS = 60;
const TRIALS = [60, 300, 1800];
const BUSY = [
    ["", _("as the configuration says")],
    ["wait", _("wait for them, a minute at most")],
    ["terminate", _("ask programs to end")],
    ["kill", _("end programs at once")],
];

/** Who has it open, an item each: what it is, where it runs, and what frees the GPU of it. */
export function holderItem(holder) {
    const where = [
        holder.user && format(_("user $0"), holder.user),
        holder.unit && format(_("unit $0"), holder.unit),
        holder.session && format(_("session $0"), holder.session),
    ].filter(each => each);
    return h("li", {},
             h("strong", {}, holder.pid ? `${holder.command} (${holder.pid})` : holder.command),
             where.length > 0 && ` ${where.join(", ")}`,
             holder.remedy && h("p", { class: "subtle lines" }, sentence({ text: holder.remedy, ...holder.words.remedy })));
}

/** The question before a switch; `trial`: it goes home by itself after a while. */
export class SwitchQuestion {
    constructor(service, path, target, { trial = false } = {}) {
        this.service = service;
        this.path = path;
        this.target = target;
        const name = nameOf(service.gpus.get(path));
        if (trial) {
            this.seconds = this.makeSeconds();
            this.dialog = new Dialog(format(_("Try $0 on vfio"), name), _("Try out"), () =>
                service.trial(path, Number(this.seconds.querySelector("input:checked").value), this.options()));
        } else {
            const title = target === "vfio" ? _("Give $0 to virtual machines") : _("Bring $0 home to the host");
            this.dialog = new Dialog(format(title, name), _("Switch"), () => service.move(path, target, this.options()));
        }
        // Whoever has the focus on a choice keeps it while all around is looked at anew: choices stay in their place.
        this.above = h("div", { class: "stack" });
        this.choice = this.makeChoice();
        this.units = new Map();
        this.unitChoice = h("fieldset", { hidden: true, onchange: () => this.look() },
                            h("legend", {}, _("Stop these units first")));
        this.below = h("div", { class: "stack" });
        this.dialog.show([this.seconds, this.above, this.choice, this.unitChoice, this.below], { ready: false });
        this.look();
    }

    options() {
        const options = {};
        const busy = this.choice.querySelector("input:checked").value;
        if (busy)
            options.busy = { t: "s", v: busy };
        if (busy === "wait")
            options.wait_seconds = { t: "d", v: WAIT_SECONDS };
        const units = [...this.units].filter(([, label]) => label.querySelector("input").checked).map(([unit]) => unit);
        if (units.length > 0)
            options.stop_units = { t: "as", v: units };
        return options;
    }

    makeSeconds() {
        return h("fieldset", {},
                 h("legend", {}, _("Then it goes home by itself after")),
                 TRIALS.map((seconds, index) => h("label", {},
                                                  h("input", { type: "radio", name: "seconds", value: seconds, checked: index === 0 }),
                                                  ` ${duration(seconds)}`)));
    }

    makeChoice() {
        return h("fieldset", { hidden: true, onchange: () => this.look() },
                 h("legend", {}, _("Where programs have it open")),
                 BUSY.map(([value, text]) => h("label", {},
                                               h("input", { type: "radio", name: "busy", value, checked: value === "" }),
                                               ` ${text}`)));
    }

    /** Ask the service anew what such a switch would do, as the options are now. An answer that comes late is dropped. */
    look() {
        const { service, path, target } = this;
        const options = this.options();
        this.looked = {};
        const mine = this.looked;
        this.tell(h("p", { role: "status" }, _("Looking at what it takes …")));
        Promise.all([service.blockers(path, target, options), service.holders(path)])
                .then(async ([blockers, holders]) =>
                    [blockers, holders, blockers.length > 0 ? [] : await service.plan(path, target, options)])
                .then(found => mine === this.looked && this.dialog.open && this.show(...found),
                      error => mine === this.looked && this.dialog.open && this.tell(alert("danger", recognized(error.message))));
    }

    /** Say this alone: there is nothing to agree to. */
    tell(said) {
        fill(this.above, said);
        fill(this.below);
        this.dialog.allow({ ready: false });
    }

    show(blockers, holders, steps) {
        const ends = ended(steps, holders);
        const starts = new Set(steps.flatMap(step => step.starts ?? []));
        const stops = stopped(steps, holders).filter(name => !starts.has(name));
        const restarts = planned(steps).filter(name => starts.has(name));
        fill(this.above,
             blockers.length > 0 && alert("warning", _("This is in the way:"),
                                          h("ul", { class: "list" }, blockers.map(each => h("li", { class: "lines" }, sentence(each))))),
             ends.length > 0 && alert("warning", format(_("This ends what runs on the screen: $0"), ends.join(", "))),
             stops.length > 0 && h("p", {}, format(_("It stops meanwhile: $0"), stops.join(", "))),
             restarts.length > 0 && h("p", {}, format(_("It restarts: $0"), restarts.join(", "))),
             holders.length > 0 && h("section", {},
                                     h("h3", {}, _("Who has it open")),
                                     h("ul", { class: "list" }, holders.map(holderItem))));
        this.offer(holders);
        fill(this.below,
             steps.length > 0 && h("details", { open: true },
                                   h("summary", {}, format(_("The plan: $0 steps"), steps.length)),
                                   h("ol", { class: "numbered" }, steps.map(step =>
                                       h("li", {}, stepTitle(step.title), " ",
                                         h("span", { class: "subtle" }, format(_("(within $0)"), duration(step.deadline))))))),
             blockers.length === 0 && steps.length === 0 && alert("info", _("There is nothing to do: it is there already.")));
        this.dialog.allow({ ready: steps.length > 0, danger: ends.length > 0 });
    }

    /** The choices that these leave. One that was made stays, and so does one that somebody is at. */
    offer(holders) {
        const named = holders.filter(each => each.unit && !each.user_unit && !each.machine).map(each => each.unit);
        const units = new Set(named.filter(unit => unit.endsWith(".service")));
        for (const [unit, label] of this.units) {
            if (!units.has(unit) && !isTaken(label)) {
                label.remove();
                this.units.delete(unit);
            }
        }
        for (const unit of units) {
            if (!this.units.has(unit)) {
                const label = h("label", {}, h("input", { type: "checkbox", value: unit }), ` ${unit}`);
                this.unitChoice.append(label);
                this.units.set(unit, label);
            }
        }
        this.unitChoice.hidden = this.units.size === 0;
        this.choice.hidden = holders.length === 0 && !isTaken(this.choice);
    }
}

/** Whether something else than what it is at first was chosen in it, or somebody is at it. */
function isTaken(choice) {
    return choice.contains(document.activeElement) || choice.querySelector("input:checked:not([value=''])") !== null;
}

/** The units and sessions that a plan stops as such, by name. */
function planned(steps) {
    return [...new Set(steps.flatMap(step => step.stops))];
}

/** Those who have to let go of it by force: gpuswitch/cli/what_ends.py, as all below. */
function forced(steps, holders) {
    if (!steps.some(step => step.ends_programs))
        return [];
    const names = planned(steps);
    return holders.filter(each => each.pid && !each.goes_by_itself && !names.includes(`session ${each.session}`) &&
                                  (each.user_unit || !names.includes(each.unit)));
}

/** Whether one is ended by stopping a unit of the system. */
function isUnit(holder) {
    return holder.unit.endsWith(".service") && !holder.user_unit && !holder.unit.startsWith("user@");
}

function inWords(holder) {
    if (isUnit(holder))
        return `${holder.unit} (${holder.command})`;
    if (holder.session)
        return format(_("$0 in session $1"), holder.command, holder.session);
    return holder.user ? format(_("$0 of $1"), holder.command, holder.user) : `${holder.command} (${holder.pid})`;
}

/** What people work with that a plan ends: desktops, sessions, programs of theirs. */
function ended(steps, holders) {
    const found = planned(steps).filter(name => DESKTOPS.includes(name) || name.startsWith("session "));
    const theirs = forced(steps, holders).filter(each => each.session || each.user_unit || DESKTOPS.includes(each.unit));
    return [...new Set([...found, ...theirs.map(inWords)])];
}

/** All units and sessions that a plan stops, and the programs of nobody in particular that it ends. */
function stopped(steps, holders) {
    const people = ended(steps, holders);
    const others = forced(steps, holders).map(each => isUnit(each) ? each.unit : inWords(each));
    return [...new Set([...planned(steps), ...others.filter(each => !people.includes(each))])];
}

/** The question before a recovery. */
export function askToRecover(service, path) {
    const gpu = service.gpus.get(path);
    const dialog = new Dialog(format(_("Recover $0"), nameOf(gpu)), _("Recover"), () => service.recover(path));
    dialog.show([
        h("p", {}, _("It is brought home, else to vfio. Where the configuration allows it, it is reset, or taken off " +
                     "the PCI bus and found again, on the way.")),
        gpu.Reason && h("p", { class: "lines" }, label(_("Why it is where it is"), "grey"), " ", recognized(gpu.Reason)),
    ], { ready: true });
}

/** The question before a switch is taken back. */
export function askToCancel(service, path) {
    const gpu = service.gpus.get(path);
    const { id } = gpu.Switch;
    const dialog = new Dialog(format(_("Cancel the switch of $0"), nameOf(gpu)), _("Take it back"),
                              () => service.cancel(path, id));
    dialog.show([h("p", {}, _("The step that runs now is finished first. Then all that was done is taken back."))],
                { ready: true });
}
