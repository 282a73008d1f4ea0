// A question in front of the page. The browser keeps the focus in it, and Escape closes it.

import { alert, button, fill, h, keepFocus } from "./elements.js";
import { recognized } from "./sentences.js";
import { _ } from "./words.js";

// Whether polkit says the one or the other depends on cockpit-bridge: the one in C has it ask, the one in Python does not.
const DENIED = ["org.gpuswitch1.Error.NotAuthorized", "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired"];

/** Why something that was asked for is refused, and what to do about that. */
export function refusal(error) {
    const hint = DENIED.includes(error.name)
        ? [_("Administrators: turn on \"Administrative access\" at the top of Cockpit, which asks for your password.")]
        : [];
    return alert("danger", recognized(error.message), ...hint);
}

let count = 0;

/** One that is open from the start; `confirm()` gives a promise: the dialog closes when that is kept, else says why not. */
export class Dialog {
    constructor(title, action, confirm) {
        const id = `dialog-${++count}`;
        this.body = h("div", { class: "pf-v6-c-modal-box__body stack", id: `${id}-body`, tabindex: "0" });
        this.trouble = h("div", { "aria-live": "assertive" });
        this.confirmed = button(action, "primary", () => this.go(confirm), { disabled: true, "data-action": "confirm" });
        this.element = h("dialog", { class: "pf-v6-c-modal-box", "aria-labelledby": id, onclose: () => this.closed() },
                         h("header", { class: "pf-v6-c-modal-box__header" },
                           h("h2", { class: "pf-v6-c-modal-box__title", id }, title)),
                         this.body,
                         h("footer", { class: "pf-v6-c-modal-box__footer bar" },
                           this.confirmed, button(_("Close"), "secondary", () => this.element.close(), { autofocus: true })));
        this.before = document.activeElement;
        document.body.append(this.element);
        this.element.showModal();
    }

    get open() {
        return this.element.open;
    }

    closed() {
        this.element.remove();
        keepFocus(this.before);
    }

    /** What it shows, below what went wrong; the rest as `allow`. */
    show(content, how) {
        fill(this.body, this.trouble, ...content);
        this.allow(how);
    }

    /** `ready` says whether there is something to agree to, `danger` that it ends what people run. */
    allow({ ready, danger = false }) {
        this.confirmed.disabled = !ready;
        this.confirmed.classList.toggle("pf-m-danger", danger);
        this.confirmed.classList.toggle("pf-m-primary", !danger);
    }

    go(confirm) {
        this.confirmed.disabled = true;
        confirm().then(() => this.element.close(), error => {
            this.confirmed.disabled = false;
            // A button that cannot be pressed has lost the focus.
            if (document.activeElement === document.body)
                this.confirmed.focus();
            this.trouble.replaceChildren(refusal(error));
        });
    }
}
