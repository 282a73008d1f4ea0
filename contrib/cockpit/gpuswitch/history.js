// Finished switches, newest first; one that is opened shows its steps as bars.

import { alert, button, fill, h, label, svg } from "./elements.js";
import { recognized, stepTitle } from "./sentences.js";
import { _, askerOf, duration, format, moment, nameOf, resultOf, stateOf, statusOf } from "./words.js";

const FEW = 20;
/** What the service keeps of them at most. */
const ALL = 1000;

export class History {
    /** `told()` is called when `entries` were read anew. */
    constructor(service, told) {
        this.service = service;
        this.told = told;
        this.limit = FEW;
        this.entries = [];
        this.open = new Map();
        this.usable = false;
        this.body = h("div", { class: "pf-v6-c-card__body wide", tabindex: "0", role: "region", "aria-label": _("History") });
        this.more = button(_("Show more"), "secondary", () => {
            this.limit = ALL;
            this.render();
        }, { hidden: true });
        this.element = h("section", { class: "pf-v6-c-card", id: "history" },
                         h("div", { class: "pf-v6-c-card__header" },
                           h("div", { class: "pf-v6-c-card__title" },
                             h("h2", { class: "pf-v6-c-card__title-text" }, _("History")))),
                         this.body,
                         h("div", { class: "pf-v6-c-card__footer" }, this.more));
    }

    /** Whether the service can be asked now. */
    allow(usable) {
        if (usable === this.usable)
            return;
        this.usable = usable;
        if (this.entries.length > 0)
            this.render();
    }

    /** Read it anew. While that is under way, one more wish for it is kept, not each. */
    read() {
        if (!this.usable)
            return;
        if (this.reading) {
            this.again = true;
            return;
        }
        this.reading = true;
        this.service.history(ALL).then(entries => {
            this.entries = entries;
            this.told();
            this.render();
        }, error => fill(this.body, alert("danger", recognized(error.message)))).finally(() => {
            this.reading = false;
            if (this.again) {
                this.again = false;
                this.read();
            }
        });
    }

    render() {
        this.more.hidden = this.entries.length <= this.limit;
        if (this.entries.length === 0) {
            fill(this.body, h("p", {}, _("Nothing has been switched yet.")));
            return;
        }
        const names = new Map([...this.service.gpus.values()].map(gpu => [gpu.Address, nameOf(gpu)]));
        const heads = [_("When"), _("GPU"), _("To"), _("Result"), _("Took"), _("Asked by"), ""];
        // Their buttons are new ones each time: what is open is kept by its id.
        const focused = document.activeElement?.dataset.entry;
        this.body.replaceChildren(h("table", { class: "history" },
                                    h("thead", {}, h("tr", {}, heads.map(head =>
                                        head ? h("th", { scope: "col" }, head) : h("td", {})))),
                                    h("tbody", {}, this.entries.slice(0, this.limit).map(entry => this.rows(entry, names)))));
        if (focused)
            this.body.querySelector(`[data-entry="${focused}"]`)?.focus();
    }

    rows(entry, names) {
        const [result, color] = resultOf(entry.result);
        const shown = this.open.get(entry.id);
        const row = h("tr", { "data-result": entry.result },
                      h("td", {}, moment(entry.finished)),
                      h("td", {}, names.get(entry.gpu) ?? entry.gpu),
                      h("td", {}, entry.target),
                      h("td", {}, label(result, color)),
                      h("td", {}, entry.count > 0 ? duration(entry.finished - entry.started) : ""),
                      h("td", {}, askerOf(entry.asker)),
                      h("td", {}, button(shown ? _("Close") : _("Show"), "link", () => this.toggle(entry), {
                          "aria-expanded": String(Boolean(shown)),
                          "aria-label": format(shown ? _("Close the switch of $0") : _("Show the switch of $0"),
                                               moment(entry.finished)),
                          "data-entry": entry.id,
                          disabled: !shown && !this.usable && entry.count > 0,
                      })));
        return shown ? [row, h("tr", {}, h("td", { colspan: "7" }, shown))] : [row];
    }

    toggle(entry) {
        if (this.open.delete(entry.id)) {
            this.render();
            return;
        }
        this.open.set(entry.id, h("p", {}, _("Looking …")));
        this.render();
        const show = content => {
            if (this.open.has(entry.id)) {
                this.open.set(entry.id, content);
                this.render();
            }
        };
        if (entry.count === 0)
            show(h("p", { class: "lines" }, recognized(entry.reason)));
        else
            this.service.historyEntry(entry.id).then(whole => show(story(whole)), error => show(alert("danger", recognized(error.message))));
    }
}

/** Of a switch that was wedged: what became of it when the kernel had returned. */
function cameBack(returned) {
    if (!returned?.state)
        return null;
    const [state] = stateOf(returned.state);
    const said = returned.at > 0
        ? format(_("The kernel returned at $0 by itself; the state of the GPU after that: $1"), moment(returned.at), state)
        : format(_("The kernel returned while the service was away; the state of the GPU after that: $0"), state);
    return h("p", { class: "lines" }, [said, recognized(returned.reason)].filter(Boolean).join("\n"));
}

/** A switch with its steps: each a bar, from where it began to where it ended. */
function story(entry) {
    const whole = Math.max(entry.finished - entry.started, 0.001);
    return h("div", { class: "stack" },
             entry.reason && h("p", { class: "lines" }, recognized(entry.reason)),
             cameBack(entry.returned),
             h("ol", { class: "steps" }, entry.steps.map(step => h("li", { "data-status": step.status },
                 h("span", { class: "subtle" }, statusOf(step.status)),
                 h("span", {}, stepTitle(step.title),
                   svg("svg", { class: "bars", viewBox: "0 0 1000 10", preserveAspectRatio: "none", "aria-hidden": "true" },
                       svg("rect", {
                           x: (1000 * (step.started - entry.started)) / whole,
                           width: Math.max(4, (1000 * step.seconds) / whole),
                           height: 10,
                           class: ["failed", "revert-failed"].includes(step.status) ? "failed" : "done",
                       }))),
                 h("span", { class: "subtle" }, duration(step.seconds))))));
}
