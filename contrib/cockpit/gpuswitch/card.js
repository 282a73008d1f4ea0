// One GPU as a card.

import { now } from "./clock.js";
import { refusal } from "./dialog.js";
import { alert, button, descriptions, fill, h, keepFocus, label, svg } from "./elements.js";
import { SwitchQuestion, askToCancel, askToRecover, holderItem } from "./questions.js";
import { keyword, recognized, sentence, stepTitle } from "./sentences.js";
import { timeline } from "./timeline.js";
import { _, duration, format, moment, nameOf, resultOf, stateOf, statusOf } from "./words.js";

const DAY = 86400;
const MOVING = ["detaching", "reattaching", "recovering"];

/** What is at rest in a known-good state may be moved, and so may what a look did not understand. */
const MOVES = { vfio: ["host", "unknown"], trial: ["host", "unknown"], host: ["vfio", "unknown"] };

export class Card {
    constructor(service, path) {
        this.service = service;
        this.path = path;
        this.head = h("div", { class: "pf-v6-c-card__title" });
        this.told = h("div", { class: "stack", "aria-live": "polite" });
        // Not read out each time: its times change every second.
        this.moving = h("div", { class: "stack" });
        this.refused = h("div", { class: "stack", "aria-live": "assertive" });
        this.facts = h("div", {});
        this.timeline = h("div", {});
        this.holders = h("div", { "aria-live": "polite" });
        this.opened = h("details", { ontoggle: () => this.opened.open && this.lookForHolders() },
                        h("summary", {}, _("Who has it open")), this.holders);
        this.buttons = {
            vfio: button(_("Give to virtual machines"), "secondary", () => new SwitchQuestion(service, path, "vfio")),
            trial: button(_("Try out"), "secondary", () => new SwitchQuestion(service, path, "vfio", { trial: true })),
            keep: button(_("Keep it there"), "secondary", () => this.keep()),
            host: button(_("Bring home"), "secondary", () => new SwitchQuestion(service, path, "host")),
            recover: button(_("Recover"), "secondary", () => askToRecover(service, path)),
            cancel: button(_("Cancel"), "secondary", () => askToCancel(service, path)),
        };
        for (const [action, each] of Object.entries(this.buttons))
            each.dataset.action = action;
        this.element = h("article", { class: "pf-v6-c-card" },
                         h("div", { class: "pf-v6-c-card__header" }, this.head),
                         h("div", { class: "pf-v6-c-card__body stack" }, this.told, this.moving, this.refused, this.timeline, this.facts, this.opened),
                         h("div", { class: "pf-v6-c-card__footer bar" }, Object.values(this.buttons)));
        this.history = [];
        // Not known yet.
        this.booted = Infinity;
    }

    /** As the service is now. */
    render() {
        const gpu = this.service.gpus.get(this.path);
        const usable = this.service.status === "ready";
        const [state, color] = stateOf(gpu.State);
        this.element.setAttribute("aria-label", nameOf(gpu));
        this.element.dataset.state = gpu.State;
        this.element.dataset.gpu = gpu.Address;
        fill(this.head, h("div", { class: "bar" },
                          h("h2", { class: "pf-v6-c-card__title-text grow" }, nameOf(gpu)), label(state, color)));
        const running = isRunning(gpu);
        fill(this.told, this.trouble(gpu), !running && this.ended(gpu));
        const trial = gpu.State === "vfio" && gpu.TrialEnds > 0;
        fill(this.moving, running && this.switch(gpu), trial && this.countdown(gpu));
        if (!trial)
            fill(this.refused);
        fill(this.facts, this.descriptions(gpu));
        fill(this.timeline, this.day(gpu));
        const anew = usable && (this.state !== gpu.State || !this.usable);
        [this.state, this.usable] = [gpu.State, usable];
        if (anew && this.opened.open)
            this.lookForHolders();
        const { vfio, trial: tryOut, keep, host, recover, cancel } = this.buttons;
        const focused = Object.values(this.buttons).find(each => each === document.activeElement);
        vfio.hidden = running || !MOVES.vfio.includes(gpu.State);
        tryOut.hidden = running || !MOVES.trial.includes(gpu.State);
        keep.hidden = running || !trial;
        host.hidden = running || !MOVES.host.includes(gpu.State);
        recover.hidden = running || !["failed", "unknown"].includes(gpu.State);
        cancel.hidden = !running || gpu.State === "recovering";
        if (focused)
            keepFocus(focused);
        for (const each of Object.values(this.buttons))
            each.disabled = !usable;
        // What waits for whoever has it open counts no more.
        this.tick(running || (trial && gpu.TrialEnds > now()));
    }

    /** While a step runs, its time goes on, and so does that of a trial; at rest nothing is done. */
    tick(running) {
        if (running && !this.ticking)
            this.ticking = setInterval(() => this.render(), 1000);
        if (!running && this.ticking) {
            clearInterval(this.ticking);
            this.ticking = null;
        }
    }

    remove() {
        this.tick(false);
        this.element.remove();
    }

    /** Of a trial: when it goes home by itself. */
    countdown(gpu) {
        const left = Math.ceil(gpu.TrialEnds - now());
        const role = { role: "timer" };
        return left > 0
            ? h("p", role, format(_("A trial: it goes home by itself in $0."), duration(left)))
            : h("p", role, _("A trial: it goes home by itself as soon as nobody has it open."));
    }

    /** No question: who has lost the screen meanwhile has to find one button only. */
    keep() {
        this.service.move(this.path, "vfio", {}).then(() => fill(this.refused), error => fill(this.refused, refusal(error)));
    }

    trouble(gpu) {
        if (!gpu.Reason)
            return null;
        // There are buttons for what is tried once more.
        const others = (gpu.Remedies ?? []).filter(each => !["recover", "to_host"].includes(each.kind));
        return alert(["failed", "wedged"].includes(gpu.State) ? "danger" : "warning", recognized(gpu.Reason),
                     ...(others.length > 0 ? [_("What may help:"), h("ul", { class: "list" }, others.map(each => h("li", {}, sentence(each))))] : []));
    }

    /** How the last switch ended, where that is not as it was asked for, and not said already. */
    ended({ Switch: last, Reason }) {
        if (!last.id || last.result === "done" || (last.reason && Reason.includes(last.reason)))
            return null;
        const [result] = resultOf(last.result);
        return alert("info", format(_("The last switch, to $0, is $1"), last.target, result),
                     ...(last.reason ? [recognized(last.reason)] : []));
    }

    /** The switch that runs, step by step. */
    switch(gpu) {
        const last = gpu.Switch;
        if (!last.id)
            return null;
        const known = this.service.steps.get(this.path);
        const steps = known?.id === last.id ? [...known.list.values()].sort((one, other) => one.index - other.index) : [];
        if (!steps.some(step => step.index === last.index) && last.title)
            steps.push({ index: last.index, title: last.title, status: "running", since: last.step_started });
        return h("section", {},
                 h("p", {}, format(_("Going to $0, step $1 of $2"), last.target, last.index, last.count)),
                 last.waiting_for && h("p", { class: "lines" }, format(_("It waits for: $0"), recognized(last.waiting_for))),
                 h("ol", { class: "steps" }, steps.map(step => {
                     const under = ["running", "reverting"].includes(step.status);
                     const seconds = under ? Math.max(0, Math.floor(now() - step.since)) : step.seconds;
                     return h("li", { "data-status": step.status },
                              h("span", { class: "subtle" }, statusOf(step.status)),
                              h("span", {}, stepTitle(step.title)),
                              h("span", { class: "subtle" }, duration(seconds)));
                 })));
    }

    descriptions(gpu) {
        const [owner, uuid] = gpu.Owner;
        const kinds = gpu.Functions.map(([address, kind, driver]) => h("li", {},
                                                                       h("span", { class: "mono" }, address), ` ${keyword(kind)}, `,
                                                                       driver || _("no driver")));
        return descriptions([
            [_("Model"), gpu.Model !== nameOf(gpu) && gpu.Model],
            [_("Address"), h("span", { class: "mono" }, gpu.Address)],
            [_("Driver"), gpu.Driver || _("none")],
            [_("At home"), gpu.HostDriver !== gpu.Driver && (gpu.HostDriver || _("none"))],
            [_("Functions"), h("ul", {}, kinds)],
            [_("IOMMU groups"), gpu.IommuGroups.join(", ")],
            [_("It brings along"), gpu.Adds.map(recognized).join(", ")],
            [_("Owner"), owner || uuid],
            [_("Since"), gpu.StateSince > 0 && moment(gpu.StateSince)],
            [_("When the machine starts"), gpu.Managed && gpu.AtBoot],
            [_("Trial ends"), gpu.TrialEnds > 0 && moment(gpu.TrialEnds)],
        ]);
    }

    /** Where it was in the last 24 hours. */
    day(gpu) {
        const end = Math.floor(now() / 60) * 60;
        const begin = end - DAY;
        const parts = timeline(gpu, this.history.filter(each => each.gpu === gpu.Address), { begin, booted: this.booted, now: end });
        const told = parts.map(({ start, end, word }) =>
            format(_("$0 for $1"), stateOf(word)[0], duration(end - start))).join(", ");
        return h("figure", {},
                 h("figcaption", { class: "subtle" }, _("The last day")),
                 svg("svg", { class: "timeline", viewBox: `0 0 ${DAY} 10`, preserveAspectRatio: "none", role: "img",
                            "aria-label": told || _("Nothing is known of it.") },
                     parts.map(({ start, end, word }) =>
                         svg("rect", { x: start - begin, y: 0, width: end - start, height: 10, class: word }))));
    }

    lookForHolders() {
        if (!this.usable) {
            // What was found before stays, as all else.
            if (!this.holders.hasChildNodes())
                fill(this.holders, h("p", {}, _("It can be seen while the service runs.")));
            return;
        }
        fill(this.holders, h("p", {}, _("Looking …")));
        this.service.holders(this.path).then(
            holders => fill(this.holders, holders.length > 0
                ? h("ul", { class: "list" }, holders.map(holderItem))
                : h("p", {}, _("Nobody."))),
            error => fill(this.holders, alert("danger", recognized(error.message))));
    }
}

function isRunning(gpu) {
    return Boolean(gpu.Switch.id && !gpu.Switch.finished) || MOVING.includes(gpu.State);
}
