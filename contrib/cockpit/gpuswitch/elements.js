// Elements of the page: made, and changed in place.

const SVG = "http://www.w3.org/2000/svg";

function filled(element, attributes, children) {
    for (const [name, value] of Object.entries(attributes)) {
        if (name.startsWith("on"))
            element.addEventListener(name.slice(2), value);
        else if (value === true)
            element.setAttribute(name, "");
        else if (value !== false && value !== null && value !== undefined)
            element.setAttribute(name, value);
    }
    element.append(...children.flat(Infinity).filter(child => child !== null && child !== undefined && child !== false));
    return element;
}

/** An HTML element. `onclick` and the like are listeners; an attribute that is false, null or undefined is left out. */
export function h(tag, attributes = {}, ...children) {
    return filled(document.createElement(tag), attributes, children);
}

/** The same in SVG. */
export function svg(tag, attributes = {}, ...children) {
    return filled(document.createElementNS(SVG, tag), attributes, children);
}

/**
 * Give an element these children. Nothing is touched where they look as those that are there: so what somebody has the
 * focus on, or reads, stays. Listeners are not compared, so children that have some must not depend on what was.
 */
export function fill(element, ...children) {
    const next = h("div", {}, ...children);
    const same = element.childNodes.length === next.childNodes.length &&
        [...next.childNodes].every((child, index) => child.isEqualNode(element.childNodes[index]));
    if (!same)
        element.replaceChildren(...next.childNodes);
}

// Modifiers are written out: the style sheet keeps what it finds here.
const BUTTONS = { primary: "pf-m-primary", secondary: "pf-m-secondary", link: "pf-m-link" };

/** A button; `kind` is primary, secondary or link. */
export function button(label, kind, onclick, attributes = {}) {
    return h("button", { type: "button", class: `pf-v6-c-button ${BUTTONS[kind]}`, onclick, ...attributes },
             h("span", { class: "pf-v6-c-button__text" }, label));
}

const ALERTS = { danger: "pf-m-danger", warning: "pf-m-warning", info: "pf-m-info", success: "pf-m-success" };

/** Where a button that had the focus is gone, the first that is left beside it gets that: else the keyboard is nowhere. */
export function keepFocus(pressed) {
    if (pressed.hidden)
        pressed.parentElement?.querySelector("button:not([hidden])")?.focus();
}

/** An alert within the page; `kind` is danger, warning, info or success. */
export function alert(kind, title, ...body) {
    return h("div", { class: `pf-v6-c-alert pf-m-inline ${ALERTS[kind]}`, role: kind === "danger" ? "alert" : "status" },
             h("p", { class: "pf-v6-c-alert__title lines" }, title),
             body.length > 0 && h("div", { class: "pf-v6-c-alert__description lines" }, ...body));
}

const COLORS = { green: "pf-m-green", blue: "pf-m-blue", red: "pf-m-red", orange: "pf-m-orange", grey: "" };

/** A word in a colour: green, blue, red, orange, grey. */
export function label(text, color) {
    return h("span", { class: `pf-v6-c-label ${COLORS[color]}` },
             h("span", { class: "pf-v6-c-label__content" }, h("span", { class: "pf-v6-c-label__text" }, text)));
}

/** Names and what they are, those without a value left out. */
export function descriptions(pairs) {
    return h("dl", { class: "pf-v6-c-description-list pf-m-horizontal pf-m-compact" },
             pairs.filter(([, value]) => value).map(([name, value]) =>
                 h("div", { class: "pf-v6-c-description-list__group" },
                   h("dt", { class: "pf-v6-c-description-list__term" },
                     h("span", { class: "pf-v6-c-description-list__text" }, name)),
                   h("dd", { class: "pf-v6-c-description-list__description" },
                     h("div", { class: "pf-v6-c-description-list__text" }, value)))));
}
