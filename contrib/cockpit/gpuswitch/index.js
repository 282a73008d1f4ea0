// The page: all GPUs as cards, the history below them.

/* global VERSION */

import { alert, button, fill, h } from "./elements.js";
import { Card } from "./card.js";
import { History } from "./history.js";
import { readClock } from "./clock.js";
import { MachineTools } from "./machine.js";
import { Service } from "./service.js";
import { followTheme } from "./theme.js";
import { _, format } from "./words.js";

function start() {
    followTheme();
    const cards = new Map();
    const tools = new MachineTools();
    const told = h("div", { class: "stack", "aria-live": "polite" });
    const list = h("div", { class: "cards" });
    const again = button(_("Try again"), "primary", () => service.open());
    const service = new Service(changed);
    let booted = Infinity;
    const history = new History(service, tellCards);

    /** What they cannot learn from the properties of their GPU. */
    function tellCards() {
        for (const card of cards.values()) {
            card.history = history.entries;
            card.booted = booted;
            card.render();
        }
    }

    function changed({ finished, only }) {
        if (only !== undefined) {
            cards.get(only)?.render();
            if (finished)
                history.read();
            return;
        }
        fill(told, state(service));
        again.hidden = service.status !== "absent";
        history.element.hidden = service.status === "absent";
        for (const [path, card] of cards) {
            if (!service.gpus.has(path) || service.status === "absent") {
                card.remove();
                cards.delete(path);
            }
        }
        if (service.status === "absent")
            return;
        for (const path of [...service.gpus.keys()].sort()) {
            if (!cards.has(path)) {
                const card = new Card(service, path);
                card.history = history.entries;
                card.booted = booted;
                cards.set(path, card);
                list.append(card.element);
            }
            cards.get(path).render();
        }
        history.allow(service.status === "ready");
        if (finished)
            history.read();
    }

    document.getElementById("page").append(
        h("header", { class: "bar" },
          h("h1", { class: "pf-v6-c-title pf-m-2xl grow" }, _("GPUs")), again, tools.buttons),
        told, tools.said, list, history.element);
    changed({ finished: false });
    readClock().then(time => {
        booted = time;
        tellCards();
    });
    document.documentElement.lang = cockpit.language.replace("_", "-");
}

/** What is to be said of the service itself. */
function state(service) {
    switch (service.status) {
    case "connecting":
        return h("p", {}, _("Looking for the service …"));
    case "absent":
        return alert("danger", _("The service gpuswitchd is not there."),
                     h("p", {}, _("It is not installed, or does not start: systemctl status gpuswitchd")),
                     service.problem && h("p", {}, service.problem));
    case "stopped":
        return alert("warning", _("The service gpuswitchd has stopped."),
                     _("What is shown is as it was last. Once it runs again, it is read anew."));
    }
    return [
        service.version && service.version !== VERSION &&
            alert("warning", format(_("The service is version $0, and this page was made for $1."), service.version, VERSION)),
        service.gpus.size === 0 && h("p", {}, _("This machine has no GPU.")),
    ];
}

start();
