// What is asked of the command: the doctor, and the report.

/* global cockpit */

import { alert, button, fill, h } from "./elements.js";
import { recognized } from "./sentences.js";
import { _, format } from "./words.js";

// What `make install` has put there is not on the PATH of every bridge: on Debian 14 root's has no /usr/local/bin.
const COMMAND = ["/bin/sh", "-c", 'PATH=/usr/local/bin:$PATH; exec gpuswitchctl "$@"', "sh"];
const KINDS = { problem: "danger", warning: "warning", ok: "success" };

/** Run it as root where that is allowed; gives its output. An error has its status and, where it failed, its output. */
function run(...words) {
    return new Promise((resolve, reject) => {
        cockpit.spawn([...COMMAND, ...words], { superuser: "try", err: "message" })
                .then(resolve, (error, output) => reject(Object.assign(error, { output })));
    });
}

/** What the doctor says. Its status tells how well the machine is, so all that it has said whole is an answer. */
function examined(error) {
    try {
        return JSON.parse(error.output);
    } catch {
        throw error;
    }
}

/** Two buttons, and below them what came of it. */
export class MachineTools {
    constructor() {
        this.said = h("div", { class: "stack", id: "doctor", "aria-live": "polite" });
        this.doctor = button(_("Look for problems"), "secondary", () => this.examine(), { "data-action": "doctor" });
        this.report = button(_("Download a report"), "secondary", () => this.download(), { "data-action": "report" });
        this.buttons = [this.doctor, this.report];
        this.url = "";
    }

    /** One at a time; what goes wrong is said. */
    busy(pressed, work) {
        pressed.disabled = true;
        fill(this.said, h("p", {}, _("Looking …")));
        work.catch(error => fill(this.said, alert("danger", recognized(error.message ?? String(error)))))
                .finally(() => { pressed.disabled = false });
    }

    examine() {
        this.busy(this.doctor, run("doctor", "--json").then(JSON.parse, examined).then(said => this.show(said)));
    }

    show(said) {
        if (said.error)
            throw new Error(said.error.text);
        const worth = said.findings.filter(each => each.severity !== "ok");
        const unseen = said.unseen.map(each => `${recognized(each.what)}: ${recognized(each.why)}`);
        fill(this.said,
             worth.map(each => alert(KINDS[each.severity], each.gpu ? `${each.gpu}: ${recognized(each.reason)}` : recognized(each.reason),
                                     each.remedy && h("p", {}, recognized(each.remedy)),
                                     each.commands.length > 0 && h("pre", { class: "mono lines" }, each.commands.join("\n")))),
             alert(worth.length > 0 ? "info" : "success",
                   format(_("$0 things are well."), said.findings.length - worth.length)),
             unseen.length > 0 && h("details", {}, h("summary", {}, _("What could not be seen")),
                                    h("ul", { class: "list" }, unseen.map(each => h("li", {}, each)))));
    }

    download() {
        this.busy(this.report, run("report", "--output", "-").then(text => {
            const name = `gpuswitch-report-${new Date().toISOString().replace(/[:.]/g, "-")}.md`;
            // The browser may read it only after this, so it stays until the next one.
            URL.revokeObjectURL(this.url);
            this.url = URL.createObjectURL(new Blob([text], { type: "text/markdown" }));
            h("a", { href: this.url, download: name }).click();
            fill(this.said, alert("success", format(_("$0 is downloaded. Read it before you give it to anybody."), name)));
        }));
    }
}
