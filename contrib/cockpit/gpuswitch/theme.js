// Light or dark, as Cockpit's shell is: its pkg/lib/cockpit-dark-theme.ts.

const dark = window.matchMedia("(prefers-color-scheme: dark)");

function apply(style = localStorage.getItem("shell:style") ?? "auto") {
    document.documentElement.classList.toggle("pf-v6-theme-dark", style === "dark" || (style === "auto" && dark.matches));
}

/** Follow the shell, and where that says so, the system. */
export function followTheme() {
    window.addEventListener("storage", event => event.key === "shell:style" && apply());
    window.addEventListener("cockpit-style", event => apply(event.detail.style));
    dark.addEventListener("change", () => apply());
    apply();
}
